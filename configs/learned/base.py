"""What the short runs of learned methods share.

Each config here takes arguments, for example
`--config configs/learned/evit.py:backbone=/tmp/backbone`:
  backbone: workdir of a finished run of `backbone.py` to start from; without it
    training starts anew.
  runlocal: two steps, for tests.
"""

from typing import Any

import ml_collections

from configs import common
from configs.learned import backbone


def parse_arg(arg: str, **defaults: Any) -> ml_collections.ConfigDict:
  """`common.parse_arg` with `backbone`."""
  return common.parse_arg(arg, backbone="", **defaults)


def start(values: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Fine-tunes the model of `backbone.py` for 100 steps."""
  config = backbone.get_config("runlocal" if values.runlocal else "")
  if values.backbone:
    config.init = values.backbone
  config.optimizer.update(lr=2e-3, warmup=10, ema=0.9)
  config.steps, config.checkpoint.every = 100, 100
  if values.runlocal:
    common.shorten(config)
  return config


def distil(config: ml_collections.ConfigDict, teacher: str) -> None:
  """Cross entropy + half the divergence from a teacher, up to a factor."""
  if teacher:
    config.teacher, config.task.distill = teacher, 1 / 3


def only(*names: str) -> tuple[str, ...]:
  """Freezes all parameters but those whose path contains one of `names`."""
  return (rf"^(?!.*({'|'.join(names)}))",)
