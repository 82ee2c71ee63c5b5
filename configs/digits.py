"""A small vision transformer on scikit-learn's handwritten digits.

python -m experiments.train --config configs/digits.py --workdir /tmp/digits

A convolutional stem, 64 tokens and a class token, width 64, depth 4. No
download; about a minute on two CPU cores to 99 % of the held-out images.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "runlocal" for two steps."""
  values = common.parse_arg(arg)
  config = common.base()
  config.model = dict(
    name="vit", image_size=8, patch_size=1, channels=1, stem="conv", width=64,
    depth=4, heads=4, mlp_dim=256, pool="class", num_classes=10,
  )  # fmt: skip
  config.data = dict(name="digits", shift=1)
  config.task = dict(name="classification", label_smoothing=0.1)
  config.recipe = common.recipe()
  config.optimizer = dict(
    name="adamw", lr=2e-3, warmup=50, weight_decay=0.05, b2=0.99, ema=0.99
  )
  config.checkpoint = dict(every=100, keep=2)
  config.steps = 350
  config.batch_size, config.eval_batch_size = 64, 120
  config.log_every, config.eval_every = 50, 1000
  config.threads = 1
  if values.runlocal:
    common.shorten(config)
    config.model.update(width=16, depth=2, heads=2, mlp_dim=32)
  return config


def sweep():
  """Token merging while training, for `python -m experiments.runner`."""
  for keep in (0.8, 0.6, 0.4):
    yield {"recipe.name": "tome", "recipe.keep": keep}
