"""EViT on digits: one of 36 tokens and a fused one from block 0 on.

python -m experiments.train --workdir DIR \\
  --config configs/learned/evit.py:backbone=BACKBONE

All tokens at first, then fewer along a cosine: five compilations.
"""

import ml_collections

from configs.learned import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: see `base`."""
  values = base.parse_arg(arg)
  config = base.start(values)
  config.recipe = dict(
    name="evit",
    budget=dict(name="once", keep=1 / 18, layer=0),
    keep=1 / 18,
    warmup=dict(start=0.1, stop=0.5, levels=5, stages=1),
  )
  return config
