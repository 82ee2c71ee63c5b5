"""Sparsifiner on digits: every query sees 2 of 37 keys.

python -m experiments.train --workdir FIRST \\
  --config configs/learned/sparsifiner.py:phase=predict,backbone=BACKBONE
python -m experiments.train --workdir DIR \\
  --config configs/learned/sparsifiner.py:teacher=BACKBONE,backbone=FIRST

In the first phase the predictors learn the attention of the frozen backbone,
in the second the backbone learns to work with what they select.
"""

import ml_collections

from configs.learned import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: see `base`; phase: "predict" or "sparse"; teacher: workdir."""
  values = base.parse_arg(arg, phase="sparse", teacher="")
  if values.phase not in ("predict", "sparse"):
    raise ValueError(f"phase={values.phase!r}: must be 'predict' or 'sparse'")
  config = base.start(values)
  predict = values.phase == "predict"
  config.recipe = dict(
    name="sparsifiner",
    options=dict(share=0.05, predict=predict, weight=0.01 if predict else 1.0),
  )
  if predict:
    config.optimizer.update(freeze=base.only("learned"), weight_decay=0.0)
    config.optimizer.lr = 1e-2
  else:
    base.distil(config, values.teacher)
  return config
