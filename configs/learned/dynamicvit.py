"""DynamicViT on digits: learns which 4 of 36 tokens to keep before block 0.

python -m experiments.train --workdir DIR \\
  --config configs/learned/dynamicvit.py:backbone=BACKBONE

Gumbel keep bits, ratio loss and distillation from the backbone.
"""

import ml_collections

from configs.learned import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: see `base`."""
  values = base.parse_arg(arg)
  config = base.start(values)
  config.recipe = dict(
    name="dynamicvit", budget=dict(name="once", keep=1 / 9, layer=0)
  )
  base.distil(config, values.backbone)
  return config
