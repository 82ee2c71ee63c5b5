"""PYRA on digits: a frozen backbone, 55 % of the tokens remain at a block.

python -m experiments.train --workdir DIR \\
  --config configs/learned/pyra.py:backbone=BACKBONE

Trained are the modulation, LoRA of rank 8 and the classifier.
"""

import ml_collections

from configs.learned import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: see `base`."""
  values = base.parse_arg(arg)
  config = base.start(values)
  config.recipe = dict(
    name="pyra", budget=dict(name="ratio", rho=0.55, layers="all")
  )
  config.optimizer.freeze = base.only("learned", "adapt_", "head/classifier")
  return config
