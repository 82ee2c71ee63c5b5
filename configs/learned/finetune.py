"""DynamicViT on DeiT-S, or any recipe on any published model of images.

python -m experiments.data.tfds_source --builder imagenet2012 --data_dir DIR
python -m experiments.train --config configs/learned/finetune.py --workdir DIR

Starts from `facebook/deit-small-patch16-224`, keeps 70, 49 and 34 % of the
tokens, and distils from the checkpoint: 30 epochs of ImageNet, as published,
but with one learning rate for predictors and backbone. Any other checkpoint
(folder or hub id) on images of your own, IMAGES/train/CLASS/*.jpg and
IMAGES/test/CLASS/*.jpg:

python -m experiments.train --workdir DIR \\
  --config configs/learned/finetune.py:checkpoint=NAME,images=IMAGES,head=new

`head=new` learns the classes of the folders; without it, they have to be labels
of the checkpoint. The result becomes a published checkpoint again with
`python -m experiments.export`; see docs/learned.md.
"""

import ml_collections

from configs import common
from configs.learned import base

DEIT_S = "facebook/deit-small-patch16-224"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: any of these.

  checkpoint: to start from and, unless `head=new`, to distil from.
  images: folder of images; without it, ImageNet from tensorflow-datasets.
  head: "own" or "new", see `experiments.training.published.FromInit`.
  recipe, keep: "dynamicvit" at its own budget without them.
  data_dir: where ImageNet was prepared.
  runlocal: two steps, for tests.
  """
  values = common.parse_arg(
    arg, checkpoint=str, images=str, head="own", recipe="dynamicvit",
    keep=float, data_dir=str,
  )  # fmt: skip
  config = common.base()
  config.model = dict(name="init", head=values.head)
  config.init = values.checkpoint or DEIT_S
  config.task = dict(name="classification", label_smoothing=0.1)
  config.recipe = common.recipe(values.recipe, values.keep)
  if values.head == "own":
    base.distil(config, config.init)
  config.data = dict(crop="resized", layers=2, magnitude=9.0)
  if values.images:
    _own_images(config, values.images)
  else:
    _imagenet(config, values.data_dir)
  if values.checkpoint is None:
    # What the checkpoint is, so that the config can be read without it.
    config.model = dict(
      name="vit", image_size=224, patch_size=16, width=384, depth=12, heads=6,
      mlp_dim=1536, epsilon=1e-12, num_classes=1000,
    )  # fmt: skip
  if values.runlocal:
    common.shorten(config)
    config.processes, config.eval_batch_size = 0, 8
    if values.recipe == "dynamicvit":
      config.recipe.budget = dict(name="once", keep=0.5, layer=0)
    if values.checkpoint is None:
      config.init = config.teacher = None
      config.model.update(image_size=32, width=24, depth=1, heads=3, mlp_dim=48)
      config.data.size = 32
  return config


def _imagenet(config: ml_collections.ConfigDict, data_dir: str | None) -> None:
  """30 epochs."""
  config.data.update(
    name="tfds_images", builder="imagenet2012", train="train",
    test="validation", data_dir=data_dir, size=224, num_classes=1000,
  )  # fmt: skip
  config.optimizer = dict(
    name="adamw", lr=1e-4, warmup=2500, weight_decay=0.05, ema=0.9999
  )
  config.precision = "bfloat16"
  config.steps = 37_500
  config.batch_size, config.eval_batch_size = 1024, 1000
  config.checkpoint = dict(every=2500, keep=2)
  config.log_every, config.eval_every = 100, 12_500
  config.threads, config.processes = 16, 16


def _own_images(config: ml_collections.ConfigDict, path: str) -> None:
  """Some thousand images."""
  config.data.update(name="folder_images", path=path)
  config.optimizer = dict(
    name="adamw", lr=1e-4, warmup=100, weight_decay=0.05, ema=0.99
  )
  config.steps = 1000
  config.batch_size = config.eval_batch_size = 64
  config.checkpoint = dict(every=250, keep=2)
  config.log_every, config.eval_every = 20, 250
