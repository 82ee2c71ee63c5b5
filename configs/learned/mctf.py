"""MCTF on digits: 55 % of the tokens a block, with reduction consistency.

python -m experiments.train --workdir DIR \\
  --config configs/learned/mctf.py:backbone=BACKBONE

Every batch also goes through the unreduced model; where the model is sure, the
reduced features follow the unreduced ones.
"""

import ml_collections

from configs.learned import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: see `base`."""
  values = base.parse_arg(arg)
  config = base.start(values)
  config.recipe = dict(
    name="mctf", budget=dict(name="ratio", rho=0.55, layers="all")
  )
  config.task.auxiliary = (
    dict(
      name="consistency", weight=3.0, confidence=0.4, detach=True, supervise=1.0
    ),
  )
  return config
