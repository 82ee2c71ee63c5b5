"""Attamba on associative recall: one key for every two tokens, and their order.

python -m experiments.train --workdir DIR --config configs/learned/attamba.py

A context is pairs and nothing else, and each key is also a value. A decoder of
one block is trained from scratch, as the paper trains its models: what a pair
says has to be in the one key and value that stand for it. Other kinds are what
reads as many keys or all of them; `scripts/learned_recall.py` trains them all.
"""

import ml_collections

from configs import common, recall


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: kind; runlocal.

  kind: "states" for Attamba; "frozen" for its state-space models as they are
  drawn; "means" for plain means of two tokens (and up to three exact ones);
  "window" for as many last tokens as the last query sees keys of chunks and
  tokens; "dense" for all tokens; "deep" for all tokens in two blocks.
  """
  values = common.parse_arg(arg, kind="states")
  kinds = ("states", "frozen", "means", "window", "dense", "deep")
  if values.kind not in kinds:
    raise ValueError(f"kind={values.kind!r}: must be one of {kinds}")
  local = "runlocal" if values.runlocal else ""
  config = recall.get_config(",".join(filter(None, ["length=34", local])))
  # As many key heads as make up the width, which Attamba needs.
  heads, ids = 2, 16
  config.model.update(
    layers=("full",), window=None, depth=2 if values.kind == "deep" else 1,
    heads=heads, kv_heads=heads, vocabulary=1 + 2 * ids,
  )  # fmt: skip
  if not values.runlocal:
    config.model.update(width=32, mlp_dim=64)
    config.steps, config.checkpoint.every = 400, 400
  config.model.head_dim = config.model.width // heads
  config.data.update(
    ordered=True, keys=ids, values=1, fillers=ids - 1, least=8
  )  # fmt: skip
  if not values.runlocal:
    config.data.pairs = ids
  config.optimizer.lr, config.batch_size = 1e-2, 32
  if values.kind in ("states", "frozen"):
    options = dict(chunk=2, state=16, heads=2)
    config.recipe = dict(name="attamba", options=options)
  if values.kind == "frozen":
    config.optimizer.freeze = ("slots",)
  elif values.kind == "means":
    options = dict(group=2, weighted=False)
    config.recipe = dict(name="cca", keep=2 / 34, options=options)
  elif values.kind == "window":
    # Seventeen ends of chunks, itself and the token before it.
    config.recipe = dict(
      name="minference_a_shape", keep=19 / 34, options=dict(first=0)
    )
  return config
