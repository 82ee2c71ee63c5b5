"""Learned visual-token methods on questions about a grid of digits.

python -m experiments.train --config configs/vlm_grid.py --workdir BACKBONE
python -m experiments.train --workdir DIR \\
  --config configs/learned/questions.py:method=trim,backbone=BACKBONE

Goes on from the model of `vlm_grid.py` with one question an image, whose texts
end where the answer begins: what a method keeps is chosen by the last token of
the question, as when it answers. A quarter of the visual tokens remain.
"""

import ml_collections

from configs import common, vlm_grid
from configs.learned import base

KEEP = 0.25
# What is trained besides the recipe: everything, or its own modules.
WHOLE = ("plain", "random_visual", "avgpool_visual", "trim", "pyramiddrop")
MODULES = ("dymu", "covipal")
# Phases of training, each from where the one before ended.
PHASES = {"covipal": ("guided", "gated")}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: any of these.

  method: one of `WHOLE`, which train the whole model with the recipe on, or of
    `MODULES`, which leave the backbone as it is.
  backbone: workdir of a finished run of `vlm_grid.py` to start from.
  phase: of `covipal`, "guided" or "gated"; each starts from `backbone`, the
    second usually from the run of the first.
  runlocal: two steps, for tests.
  """
  values = base.parse_arg(arg, method="trim", phase="gated")
  if values.method not in (*WHOLE, *MODULES):
    raise ValueError(
      f"method={values.method!r}: must be one of {(*WHOLE, *MODULES)}"
    )
  config = vlm_grid.get_config("runlocal" if values.runlocal else "")
  if values.backbone:
    config.init = values.backbone
  config.data.update(turns=1, asking=True)
  config.optimizer.update(lr=1e-3, warmup=20, ema=0.95)
  if not values.runlocal:
    config.steps, config.checkpoint.every = 400, 400
  if values.method != "plain":
    config.recipe = common.recipe(values.method, KEEP)
  if values.method in MODULES:
    config.optimizer.update(freeze=base.only("learned"), weight_decay=0.0)
  if values.method == "dymu":
    # The mean over batches of thresholds that leave a quarter of the patches;
    # a plain image may leave half of them at most.
    config.recipe.keep = 2 * KEEP
    config.recipe.options = dict(thresholds="learned", average=KEEP)
    config.optimizer.update(lr=1e-2, warmup=0, ema=0.98)
    if not values.runlocal:
      config.steps, config.checkpoint.every = 300, 300
  if values.method == "covipal":
    config.recipe.options = dict(phase=values.phase)
    config.optimizer.lr = 3e-3
  return config
