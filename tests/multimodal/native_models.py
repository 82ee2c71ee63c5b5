"""Tiny models whose vision tower has native resolution, and prompts."""

import numpy as np

from tests.multimodal import vlm_models
from tests.multimodal.vlm_models import IMAGE, PLAIN
from tokjax.models import (
  DecoderConfig,
  Rotary,
  VisionLanguage,
  VisionLanguageConfig,
  VisionLanguageGenerator,
)
from tokjax.models.native_patches import NativeResolutionConfig, Patches
from tokjax.models.projector import ProjectorConfig
from tokjax.slots import Slots

VISION = NativeResolutionConfig(
  patch_size=2, frames=1, width=16, depth=2, heads=2, mlp_dim=24, window=4,
  full=(0,), norm="rms", gated=True, activation="silu",
)  # fmt: skip
LANGUAGE = DecoderConfig(
  vocabulary=40, width=24, depth=2, heads=2, kv_heads=1, head_dim=16,
  mlp_dim=32, length=256, rotary=Rotary(sections=(2, 3, 3)), qkv_bias=True,
  tied=False,
)  # fmt: skip
# Prompts with one placeholder an image, and the grid of each.
PROMPTS = ([1, IMAGE, 7, 9, 3], [2, 5], [IMAGE, 8, IMAGE, 4])
GRIDS = (((6, 8),), (), ((4, 4), (10, 4)))
MORE = np.random.default_rng(6).integers(1, 38, (2, 3)).astype(np.int32)


def config(**changes) -> VisionLanguageConfig:
  own = dict(
    vision=VISION, language=LANGUAGE, image_token=IMAGE,
    projector=ProjectorConfig(24, hidden=64, norm="rms", parts=4),
  )  # fmt: skip
  return VisionLanguageConfig(**{**own, **changes})


def generator(slots: Slots = PLAIN, **options) -> VisionLanguageGenerator:
  made = VisionLanguage(config(), slots)
  own = dict(
    capacity=32, decode=2, buckets=(32,), image_buckets=(4,),
    size_buckets=(12,),
  )  # fmt: skip
  return VisionLanguageGenerator(
    made, vlm_models.params_of(made.config), **{**own, **options}
  )


def image(grid: tuple[int, int], seed: int = 0) -> Patches:
  """An image of drawn patches."""
  rng = np.random.default_rng([seed, *grid])
  shape = (grid[0] * grid[1], VISION.patch_features)
  pixels = rng.normal(size=shape).astype(np.float32)
  return Patches(pixels, np.asarray(grid, np.int32))


def images_of(grids=GRIDS) -> list[list[Patches]]:
  """Images of each prompt."""
  return [[image(grid) for grid in own] for own in grids]


def answered(made, prompts, images, more) -> np.ndarray:
  """Logits behind the prompt and behind each token that follows."""
  going = made.prefill(prompts, images)
  found = [np.asarray(going.logits)]
  for token in more:
    going = made.step(going, token)
    found.append(np.asarray(going.logits))
  return np.stack(found)
