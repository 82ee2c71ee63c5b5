"""A small vision-language model that answers questions about a grid of digits.

python -m experiments.train --config configs/vlm_grid.py --workdir DIR

"Which digit is green?", "how many show 7?", "which is the largest?". A vision
encoder, a projector and a language model, trained together on conversations of
five questions about an image; nothing is downloaded. `:data=easy_vqa` has the
pictures and questions of the package `easy-vqa` instead: one shape, 64 patches.
"""

import ml_collections

from configs import common
from experiments.data.easy_vqa import EasyVqa
from experiments.data.grid_questions import GridQuestions
from experiments.data.words import IMAGE


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: data: "grid" or "easy_vqa"; "runlocal" for two steps."""
  values = common.parse_arg(arg, data="grid")
  if values.data not in ("grid", "easy_vqa"):
    raise ValueError(f"data={values.data!r}: must be 'grid' or 'easy_vqa'")
  config = common.base()
  if values.data == "grid":
    data = GridQuestions(side=4, digits=8, turns=5, heldout=600)
    config.data = dict(
      name="grid_questions", side=data.side, digits=data.digits,
      turns=data.turns, heldout=data.heldout,
    )  # fmt: skip
  else:
    data = EasyVqa()
    config.data = dict(
      name="easy_vqa", turns=data.turns, heldout=data.heldout
    )
  width = 48
  config.model = dict(
    name="vlm", image_token=IMAGE, pass_class=True,
    vision=dict(
      image_size=data.image_size, patch_size=8, channels=data.channels,
      width=32, depth=2, heads=2, mlp_dim=64, pool="none",
    ),
    projector=dict(width=width),
    language=dict(
      vocabulary=data.num_classes, width=width, depth=4, heads=3, kv_heads=3,
      mlp_dim=96, length=256, embed_scale=True,
      layers=("sliding", "full", "full", "full"), window=4,
    ),
  )  # fmt: skip
  # ViT's default is a head of 1000 classes.
  config.model.vision.num_classes = None
  config.task = dict(name="questions")
  config.recipe = common.recipe()
  config.optimizer = dict(
    name="adamw", lr=2e-3, warmup=50, b2=0.98, weight_decay=0.02, ema=0.98
  )
  config.steps = 1400
  config.batch_size, config.eval_batch_size = 64, 120
  config.checkpoint = dict(every=500, keep=1)
  config.log_every, config.eval_every = 50, 500
  config.threads = 2
  if values.runlocal:
    common.shorten(config)
    config.data.heldout = 24
    config.model.vision.update(width=12, depth=1, mlp_dim=12)
    config.model.language.update(depth=3, mlp_dim=16)
    config.eval_batch_size = 24
  return config
