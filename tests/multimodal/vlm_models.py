"""Tiny vision-language models with random parameters, and prompts for them."""

import functools

import jax
import numpy as np

from tests.contract.case import draw_params
from tests.decoder.models import config as language
from tokjax.interop import model_shapes
from tokjax.models import (
  VisionLanguage,
  VisionLanguageConfig,
  VisionLanguageGenerator,
  ViTConfig,
)
from tokjax.models.projector import ProjectorConfig
from tokjax.slots import Slots

IMAGE, LENGTH, DECODE = 39, 64, 3
VISION = ViTConfig(
  image_size=12, patch_size=2, width=16, depth=3, heads=2, mlp_dim=24,
  num_classes=None, pool="none", pre_norm=True, activation="quick_gelu",
)  # fmt: skip
PLAIN = Slots()
# Prompts with one placeholder an image.
PROMPTS = ([1, IMAGE, 7, 9, 3], [2, 5], [IMAGE, 8, IMAGE, 4], [3, IMAGE])


def config(**changes) -> VisionLanguageConfig:
  text = language(depth=3, tied=False, length=256)
  own = dict(
    vision=VISION, projector=ProjectorConfig(text.width), language=text,
    image_token=IMAGE, ahead=True,
  )  # fmt: skip
  return VisionLanguageConfig(**{**own, **changes})


@functools.cache
def params_of(config: VisionLanguageConfig):
  """Parameters that are all drawn, and different from each other."""
  made, prompts = model_shapes.specimen(config)
  shapes = jax.eval_shape(made.init, jax.random.key(0), prompts)
  return draw_params(shapes["params"])


def model(slots: Slots = PLAIN, **changes) -> VisionLanguage:
  return VisionLanguage(config(**changes), slots)


def generator(slots: Slots = PLAIN, **changes) -> VisionLanguageGenerator:
  made = model(slots, **changes)
  return VisionLanguageGenerator(
    made, params_of(made.config), capacity=128, decode=DECODE,
    buckets=(32, 128), image_buckets=(2, 4),
  )  # fmt: skip


def images_of(prompts=PROMPTS, seed=3) -> list[list[np.ndarray]]:
  """Images of each prompt, drawn one after the other."""
  rng = np.random.default_rng(seed)
  draw = lambda: rng.normal(size=(12, 12, 3)).astype(np.float32)
  return [[draw() for token in ids if token == IMAGE] for ids in prompts]
