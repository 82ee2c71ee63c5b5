"""Attamba on associative recall: one key for every four tokens.

python -m experiments.train --workdir DIR --config configs/learned/attamba.py

A decoder of two blocks, without the window of `configs/recall.py`, is trained
from scratch, as the paper trains its models. With other kinds, what reads as
many keys or all of them; `scripts/learned_recall.py` trains them all.
"""

import ml_collections

from configs import common, recall


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: kind; runlocal.

  kind: "states" for Attamba; "frozen" for its state-space models as they are
  drawn; "means" for plain means of four tokens (and up to five exact ones);
  "window" for as many last tokens as the last query sees keys of chunks and
  tokens; "dense" for all tokens.
  """
  values = common.parse_arg(arg, kind="states")
  kinds = ("states", "frozen", "means", "window", "dense")
  if values.kind not in kinds:
    raise ValueError(f"kind={values.kind!r}: must be one of {kinds}")
  local = "runlocal" if values.runlocal else ""
  config = recall.get_config(",".join(filter(None, ["length=64", local])))
  # As many key heads as make up the width, which Attamba needs.
  heads = 2
  config.model.update(
    layers=("full",), window=None, depth=2, heads=heads, kv_heads=heads,
    head_dim=config.model.width // heads,
  )  # fmt: skip
  config.optimizer.lr = 2e-3
  if not values.runlocal:
    config.steps, config.checkpoint.every = 600, 600
  if values.kind in ("states", "frozen"):
    config.recipe = dict(name="attamba", options=dict(chunk=4, state=16))
  if values.kind == "frozen":
    config.optimizer.freeze = ("slots",)
  elif values.kind == "means":
    options = dict(group=4, weighted=False)
    config.recipe = dict(name="cca", keep=2 / 64, options=options)
  elif values.kind == "window":
    # Seventeen ends of chunks, itself and the token before it.
    config.recipe = dict(
      name="minference_a_shape", keep=19 / 64, options=dict(first=0)
    )
  return config
