"""The plain model that learned methods start from, and their data.

python -m experiments.train --config configs/learned/backbone.py --workdir DIR

The largest of four digits among 32 scrambled ones; each cell is a token. What a
cell shows cannot be read by a linear map, so that the first attention does not
know the answer yet, and it matters which tokens are left. About half a minute
on two idle CPU cores.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "runlocal" for two steps."""
  values = common.parse_arg(arg)
  config = common.base()
  config.model = dict(
    name="vit", image_size=48, patch_size=8, channels=1, width=32, depth=3,
    heads=2, mlp_dim=64, pool="class", num_classes=10,
  )  # fmt: skip
  config.data = dict(name="digit_grid", side=6, digits=4, copies=4)
  config.task = dict(name="classification")
  config.recipe = common.recipe()
  config.optimizer = dict(
    name="adamw", lr=3e-3, warmup=30, weight_decay=0.05, b2=0.99, ema=0.98
  )
  config.steps = 500
  config.checkpoint = dict(every=500, keep=1)
  config.batch_size, config.eval_batch_size = 64, 120
  config.log_every, config.eval_every = 50, 1000
  config.threads = 1
  if values.runlocal:
    common.shorten(config)
    config.model.update(width=8, depth=1, mlp_dim=16)
  return config
