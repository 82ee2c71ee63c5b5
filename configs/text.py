"""A byte-level language model: next byte of Python's own library.

python -m experiments.train --config configs/text.py --workdir /tmp/text
python -m experiments.train --config configs/text.py:corpus=lm1b ...

The default corpus is the source of the standard library; nothing is
downloaded. Other names are text builders of tensorflow-datasets.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "corpus=...", "data_dir=...", "runlocal"."""
  values = common.parse_arg(arg, corpus="standard_library", data_dir=str)
  length = 128
  config = common.base()
  config.model = dict(
    name="decoder", length=length, width=128, depth=4, heads=4, kv_heads=2,
    mlp_dim=384,
  )  # fmt: skip
  if values.corpus == "standard_library":
    config.data = dict(name="standard_library", length=length, heldout=512)
  else:
    config.data = dict(
      name="tfds_text", builder=values.corpus, length=length, heldout=512,
      data_dir=values.data_dir,
    )  # fmt: skip
  config.task = dict(name="language")
  config.recipe = common.recipe()
  config.optimizer = dict(name="adamw", lr=2e-3, warmup=100, b2=0.98, ema=0.995)
  config.steps = 1000
  config.batch_size, config.eval_batch_size = 32, 64
  config.checkpoint = dict(every=200, keep=2)
  config.log_every, config.eval_every = 50, 500
  config.threads = 1
  if values.runlocal:
    common.shorten(config)
    config.model.update(width=16, depth=1, mlp_dim=32, length=32)
    config.data.update(length=32, heldout=32)
  return config
