"""A small decoder on associative recall: the model of needle experiments.

python -m experiments.train --config configs/recall.py:length=48 \
  --workdir /tmp/short
python -m experiments.train --config configs/recall.py --workdir /tmp/recall \
  --config.init=/tmp/short

Pairs of key and value stand in noise and are asked for at the end; see
`experiments/data/recall.py`. Nothing is downloaded. The model learns in a few
hundred steps that a value follows its key and that a question is a key, as long
as contexts are short and the learning rate is small; longer contexts then take
few more steps.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "length=...", "runlocal"."""
  values = common.parse_arg(arg, length=256)
  config = common.base()
  length, ids = values.length, 32
  short = length < 128
  config.data = dict(
    name="recall", length=length, pairs=6 if short else 8, keys=ids, values=ids,
    fillers=ids - 1, least=4 if short else 16, heldout=256,
  )  # fmt: skip
  # The first block sees two tokens, so that a value is stored with its key; the
  # others have to find it. With a large base, most features of a head hardly
  # rotate.
  config.model = dict(
    name="decoder", vocabulary=3 * ids, length=length, width=64, depth=3,
    heads=2, kv_heads=1, head_dim=32, mlp_dim=128,
    layers=("sliding", "full", "full"), window=2,
    rotary=dict(base=500_000.0), embed_scale=True,
  )  # fmt: skip
  config.task = dict(name="language")
  config.recipe = common.recipe()
  config.optimizer = dict(
    name="adamw", lr=1.5e-3, warmup=50, b2=0.95, weight_decay=0.01
  )
  config.steps = 500
  config.batch_size, config.eval_batch_size = 64 if short else 16, 64
  config.checkpoint = dict(every=100, keep=2)
  config.log_every, config.eval_every = 50, 500
  config.threads = 1
  if values.runlocal:
    common.shorten(config)
    config.model.update(width=16, mlp_dim=32, length=32)
    config.data.update(length=32, pairs=4, heldout=16, least=4)
  return config
