"""FLASH's draft on captions of a grid of digits.

python -m experiments.train --config configs/learned/drafts.py --workdir TARGET
python -m experiments.train --workdir DIR \\
  --config configs/learned/drafts.py:backbone=TARGET

The first trains the model of `vlm_grid.py` to read its images aloud, the second
a draft on it, which leaves the model as it is. `scripts/learned_drafts.py` runs
both and counts how many guesses are right.
"""

import ml_collections

from configs import common, vlm_grid
from configs.learned import base
from experiments.data.grid_captions import GridCaptions


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: any of these.

  backbone: workdir of a finished run of this config to train a draft on.
  latents: what the visual tokens are pooled to for it; 0: all of them.
  runlocal: two steps, for tests.
  """
  values = base.parse_arg(arg, latents=4)
  config = vlm_grid.get_config("runlocal" if values.runlocal else "")
  data = GridCaptions(side=4, digits=8, heldout=200)
  config.data = dict(
    name="grid_captions", side=data.side, digits=data.digits,
    heldout=data.heldout,
  )  # fmt: skip
  config.eval_batch_size = 100
  if not values.runlocal:
    config.steps, config.checkpoint.every = 500, 500
  if values.backbone:
    config.init = values.backbone
    config.recipe = common.recipe("flash")
    latents = values.latents or None
    config.recipe.options = dict(latents=latents, ahead=4)
    # AdamW with a warm-up, as published, at a rate for so few steps.
    config.optimizer.update(
      lr=3e-3, warmup=20, b2=0.95, ema=0.95, weight_decay=0.01,
      freeze=base.only("draft"),
    )  # fmt: skip
    if not values.runlocal:
      config.steps, config.checkpoint.every = 250, 250
  return config
