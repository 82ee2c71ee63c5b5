"""What a vision-language model makes of its slots: towers and refusals."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokjax.budgets import Encoded
from tokjax.models import merged_patches, vlm_fused, vlm_seen, vlm_tower
from tokjax.models.decoder import Decoder
from tokjax.models.merged_patches import MergedPatches
from tokjax.models.native_patches import USUAL, NativeResolutionConfig
from tokjax.models.native_resolution import NativeResolution
from tokjax.models.projector import Projector
from tokjax.models.reducer import sequence_of_patches
from tokjax.models.vit import ViT, ViTConfig
from tokjax.models.vlm_ahead import Ahead
from tokjax.models.vlm_config import VisionLanguageConfig
from tokjax.reduce.stages import plan_stages
from tokjax.slots import Slots

# In the order in which they act.
TOWERS = ("vision", "ahead", "projector")


def passes_class(config: VisionLanguageConfig, slots: Slots) -> bool:
  """Whether the class token goes on to the language model."""
  inside = (slots.tower(name).pass_class for name in ("vision", "ahead"))
  return config.pass_class or any(inside)


def without_class(slots: Slots) -> Slots:
  """The slots for a tower; the model itself carries out `pass_class`."""
  return dataclasses.replace(slots, pass_class=False)


def vision_tower(
  config: VisionLanguageConfig, slots: Slots, dtype: Any = jnp.float32
) -> ViT | NativeResolution:
  """The encoder with its slots."""
  own = without_class(slots.tower("vision"))
  if isinstance(config.vision, NativeResolutionConfig):
    return NativeResolution(config.vision, own, dtype, parent=None)
  if config.merge > 1:
    own = merged_patches.inside(own)
  told = vlm_seen.collected(slots, config.vision.depth)
  if told:
    own = dataclasses.replace(own, collect=(*own.collect, *told))
  return ViT(config.vision, own, dtype, parent=None)


def language_slots(config: VisionLanguageConfig, slots: Slots) -> Slots:
  """The slots of the language model.

  Reductions whose budget is `Encoded` leave what the encoder left before it
  gave tokens back.
  """
  own = slots.outside_towers
  if not any(isinstance(r.budget, Encoded) for r in own.reduce):
    return own
  vision = config.vision
  assert isinstance(vision, ViTConfig)
  front = len(vision.kinds)
  sequence = sequence_of_patches(vision.num_patches, front, vision.grid)
  stages = plan_stages(
    slots.tower("vision").reduce, sequence, vision.depth, recipe=slots.name
  )
  left = [stage.outputs for block in stages for stage in block]
  whole = vision.num_patches + front
  off = 0 if passes_class(config, slots) else front
  budget = Encoded(min(left, default=whole) - off, whole - off)
  reduces = tuple(
    dataclasses.replace(r, budget=budget) if isinstance(r.budget, Encoded)
    else r
    for r in own.reduce
  )
  return dataclasses.replace(own, reduce=reduces)


def merged_tower(config: VisionLanguageConfig, slots: Slots) -> MergedPatches:
  """What acts on the merged patches of an encoder that does not merge them."""
  assert isinstance(config.vision, ViTConfig)
  own = merged_patches.behind(slots.tower("vision"))
  cfg = config.vision
  return MergedPatches(
    cfg.kinds, cfg.depth, cfg.grid, config.merge, own, parent=None
  )


def check_slots(config: VisionLanguageConfig, slots: Slots) -> None:
  """Raises ValueError where a tower cannot carry out what it is given.

  The message names the tower, besides recipe, slot and fix.
  """
  known = f"{', '.join(TOWERS)}, and outside of towers the language model"
  for name, own in slots.towers:
    if own.losses:
      raise ValueError(
        f"recipe {slots.name!r}, tower {name!r}: adds losses, which training"
        " takes from outside of towers; use a recipe that needs no training"
      )
    if name not in TOWERS:
      raise ValueError(
        f"recipe {slots.name!r} fills the tower {name!r}, which a"
        f" vision-language model does not have; its towers are {known}"
      )
  if passes_class(config, slots) and config.merge > 1:
    raise ValueError(
      f"recipe {slots.name!r}, tower 'vision': fills 'pass_class', and the"
      f" language model takes {config.merge} x {config.merge} patches, which"
      " the class token is not; use a recipe that does without it"
    )
  if config.fused is not None:
    vlm_fused.check([(t, slots.tower(t)) for t in ("vision", "ahead")])
  if passes_class(config, slots) and not config.vision.kinds:
    raise ValueError(
      f"recipe {slots.name!r}, tower 'vision': fills 'pass_class', and this"
      " encoder has no class token; use a recipe that does without one"
    )
  of = slots.tower
  if of("ahead") != Slots(name=slots.name) and not config.ahead:
    raise ValueError(
      f"recipe {slots.name!r} fills the tower 'ahead', and the features of this"
      " encoder leave behind its last block; use a recipe of the tower 'vision'"
    )
  vlm_seen.check(config, slots)
  _in_tower("vision", lambda: vision_tower(config, slots))
  if config.merge > 1:
    _in_tower("vision", lambda: merged_tower(config, slots))
  if isinstance(config.vision, ViTConfig):
    ahead, vision = without_class(of("ahead")), config.vision
    _in_tower("ahead", lambda: Ahead(vision, ahead, parent=None))
  _in_tower(
    "projector",
    lambda: Projector(config.projector, of("projector"), parent=None),
  )
  try:
    own = language_slots(config, slots)
    Decoder(config.language, own, images=True, parent=None)
  except ValueError as error:
    raise ValueError(
      f"tower 'language': {error}. A recipe of another tower is given as"
      f" recipes.get(...).within(tower), one of {', '.join(TOWERS)}"
    ) from error
  if isinstance(config.vision, ViTConfig):
    tokens_per_image(config, slots)
  else:
    own = of("projector")
    _in_tower(
      "projector", lambda: vlm_tower.check_ragged(own, "this model")
    )
    _in_tower("projector", lambda: vlm_tower.stages_of(own, USUAL, 0, None))


def _in_tower(name: str, make: Callable[[], Any]) -> Any:
  """What `make` returns; its refusals name the tower."""
  try:
    return make()
  except ValueError as error:
    raise ValueError(f"tower {name!r}: {error}") from error


@functools.lru_cache(maxsize=256)
def tokens_per_image(config: VisionLanguageConfig, slots: Slots) -> int:
  """Visual tokens of one image, as they enter the language model.

  Nothing is computed: shapes are traced.

  Raises:
    ValueError: the reductions leave nothing for a later one to do, or the
      number depends on the size of the image.
  """
  cfg = config.vision
  if isinstance(cfg, NativeResolutionConfig):
    raise ValueError(
      "image_tokens: depends on the size of an image of native resolution; see"
      " tokjax.models.vlm_native.remaining"
    )
  image = jax.ShapeDtypeStruct((1, *cfg.image_sides, cfg.channels), jnp.float32)
  key = jax.random.key(0)
  tower: Any = vision_tower(config, slots)
  out = jax.eval_shape(
    lambda x: tower.init_with_output(key, x, key=key)[0][1]["tokens"].x, image
  )
  front = len(cfg.kinds)
  patches, all_patches = out.shape[1] - front, cfg.num_patches
  grid = cfg.grid
  if (merge := config.merge) > 1:
    if patches != all_patches:
      raise ValueError(
        f"recipe {slots.name!r}, tower 'vision': leaves {patches} of"
        f" {all_patches} patches, and {merge} x {merge} of them are merged"
        " behind the encoder, for which all must be there; use a recipe that"
        " acts at the output of the last block, or within the projector"
      )
    grid = (grid[0] // merge, grid[1] // merge)
    patches = all_patches = grid[0] * grid[1]
    own = merged_patches.behind(slots.tower("vision"))
    for stage in merged_patches.stages_of(own, grid, cfg.depth)[-1]:
      patches = stage.outputs
  for name in ("ahead", "projector"):
    if name == "projector" and not passes_class(config, slots):
      front = 0
    whole = grid if patches == all_patches else None
    plan = lambda name=name, patches=patches, front=front, whole=whole: (
      vlm_tower.stages_of(slots.tower(name), patches, front, whole)
    )
    for stage in _in_tower(name, plan)[0]:
      patches = stage.outputs - front
  return patches + front
