"""DeiT-S/16 on ImageNet-1k, after the recipe of Touvron et al. (2021).

python -m experiments.data.tfds_source --builder imagenet2012 --data_dir DIR
python -m experiments.train --config configs/imagenet.py --workdir DIR

Loading needs processes: one host decodes and augments about as many hundred
images a second as it has cores.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "data_dir=...", "recipe=tome", "keep=0.5", "runlocal"."""
  values = common.parse_arg(arg, data_dir=str, recipe="none", keep=float)
  config = common.base()
  config.model = dict(
    name="vit", image_size=224, patch_size=16, width=384, depth=12, heads=6,
    mlp_dim=1536, num_classes=1000,
  )  # fmt: skip
  config.data = dict(
    name="tfds_images", builder="imagenet2012", train="train",
    test="validation", data_dir=values.data_dir, size=224,
    num_classes=1000, crop="resized", layers=2, magnitude=9.0,
  )  # fmt: skip
  config.task = dict(name="classification", label_smoothing=0.1, mixup=0.8)
  config.recipe = common.recipe(values.recipe, values.keep)
  config.optimizer = dict(
    name="adamw", lr=1e-3, warmup=6250, weight_decay=0.05, ema=0.99996
  )
  config.precision = "bfloat16"
  config.steps = 375_000
  config.batch_size, config.eval_batch_size = 1024, 1000
  config.checkpoint = dict(every=2500, keep=3)
  config.log_every, config.eval_every = 100, 12_500
  config.threads, config.processes = 16, 16
  if values.runlocal:
    common.shorten(config)
    config.processes = 0
    config.model.update(image_size=32, width=24, depth=1, heads=3, mlp_dim=48)
    config.data.update(size=32)
  return config
