"""CCA on associative recall: 8 tokens of 64 exactly, the rest in means of four.

python -m experiments.train --config configs/recall.py:length=64 \\
  --workdir BACKBONE
python -m experiments.train --workdir DIR \\
  --config configs/learned/cca.py:backbone=BACKBONE

Fine-tunes the whole decoder for 200 steps, as the paper does.
"""

import ml_collections

from configs import common, recall


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: backbone: workdir to start from; kind: of cores; runlocal.

  kind: "weighted"; "plain" for plain means; "window" for as many last tokens
  as CCA reads tokens and means; "dense" for all tokens.
  """
  values = common.parse_arg(arg, backbone="", kind="weighted")
  kinds = ("weighted", "plain", "window", "dense")
  if values.kind not in kinds:
    raise ValueError(f"kind={values.kind!r}: must be one of {kinds}")
  local = "runlocal" if values.runlocal else ""
  config = recall.get_config(",".join(filter(None, ["length=64", local])))
  if values.backbone:
    config.init = values.backbone
  config.optimizer.update(lr=1.5e-3, warmup=10)
  if not values.runlocal:
    config.steps, config.checkpoint.every = 200, 200
  if values.kind == "window":
    config.recipe = dict(
      name="minference_a_shape", keep=24 / 64, options=dict(first=0)
    )
  elif values.kind != "dense":
    weighted = values.kind == "weighted"
    options = dict(group=4, weighted=weighted)
    config.recipe = dict(name="cca", keep=1 / 8, options=options)
  return config
