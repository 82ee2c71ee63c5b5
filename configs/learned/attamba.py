"""Attamba on bytes of the standard library: one key for every eight tokens.

python -m experiments.train --workdir DIR --config configs/learned/attamba.py

A decoder of two blocks is trained from scratch on windows of 64 bytes, as the
paper trains its models from scratch. With other kinds, what reads as many keys
or all of them; `scripts/learned_text.py` trains them all.
"""

import ml_collections

from configs import common, text


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: kind: "chunks", "means", "window" or "dense"; runlocal.

  kind: "means" for plain means of eight tokens (and up to nine exact ones);
  "window" for as many last tokens as the last query sees keys of chunks and
  tokens; "dense" for all tokens.
  """
  values = common.parse_arg(arg, kind="chunks")
  kinds = ("chunks", "means", "window", "dense")
  if values.kind not in kinds:
    raise ValueError(f"kind={values.kind!r}: must be one of {kinds}")
  config = text.get_config("runlocal" if values.runlocal else "")
  heads = dict(heads=4, kv_heads=4)
  if values.runlocal:
    config.model.update(heads)
  else:
    config.model.update(heads, width=64, depth=2, mlp_dim=192, length=64)
    config.data.update(length=64, heldout=256)
    config.steps, config.checkpoint.every, config.eval_every = 200, 200, 200
    config.batch_size = 16
    # No average over steps: there are few.
    config.optimizer.update(warmup=20, ema=None)
  if values.kind == "chunks":
    config.recipe = dict(name="attamba", options=dict(chunk=8, state=16))
  elif values.kind == "means":
    options = dict(group=8, weighted=False)
    config.recipe = dict(name="cca", keep=2 / 64, options=options)
  elif values.kind == "window":
    # Nine ends of chunks, itself and the token before it.
    config.recipe = dict(
      name="minference_a_shape", keep=11 / 64, options=dict(first=0)
    )
  return config
