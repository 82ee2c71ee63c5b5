"""A DeiT-like transformer on CIFAR-10 or CIFAR-100, from tensorflow-datasets.

python -m experiments.data.tfds_source --builder cifar10
python -m experiments.train --config configs/cifar.py --workdir DIR
python -m experiments.train --config configs/cifar.py:dataset=cifar100 ...
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "dataset=cifar10", "data_dir=...", "runlocal"."""
  values = common.parse_arg(arg, dataset="cifar10", data_dir=str)
  known = {"cifar10": 10, "cifar100": 100}
  if values.dataset not in known:
    raise ValueError(f"dataset={values.dataset!r}: must be one of {[*known]}")
  classes = known[values.dataset]
  config = common.base()
  config.model = dict(
    name="vit", image_size=32, patch_size=4, stem="conv", width=192, depth=9,
    heads=3, mlp_dim=768, num_classes=classes,
  )  # fmt: skip
  config.data = dict(
    name="tfds_images", builder=values.dataset, train="train", test="test",
    data_dir=values.data_dir, size=32, num_classes=classes, crop="pad",
    pad=4, layers=2, magnitude=9.0, eval_zoom=1.0,
    mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262),
  )  # fmt: skip
  config.task = dict(name="classification", label_smoothing=0.1, mixup=0.8)
  config.recipe = common.recipe()
  config.optimizer = dict(
    name="adamw", lr=1e-3, warmup=1000, weight_decay=0.05, ema=0.9995
  )
  config.precision = "bfloat16"
  config.steps = 40_000
  config.batch_size, config.eval_batch_size = 256, 500
  config.checkpoint = dict(every=1000, keep=2)
  config.log_every, config.eval_every = 50, 2000
  config.threads, config.processes = 16, 0
  if values.runlocal:
    common.shorten(config)
    config.model.update(width=24, depth=1, mlp_dim=48)
  return config
