"""TokenLearner on digits: 4 learned averages replace 36 tokens before block 0.

python -m experiments.train --workdir DIR \\
  --config configs/learned/token_learner.py:backbone=BACKBONE

All that the model learns of the image goes through the four.
"""

import ml_collections

from configs.learned import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: see `base`."""
  values = base.parse_arg(arg)
  config = base.start(values)
  config.recipe = dict(
    name="token_learner", budget=dict(name="once", keep=1 / 9, layer=0)
  )
  return config
