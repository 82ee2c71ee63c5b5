"""Prompts with images of native resolution, laid out on the host.

Positions have three axes (Qwen2-VL): all advance with the text; in an image the
first stands still and the others are its row and column. The text goes on
behind the longer side of the image, however many tokens it has or a recipe
leaves.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokjax.models import (
  native_patches,
  native_resolution,
  vlm_prompts,
  vlm_tower,
)
from tokjax.models.decoder_slots import Capacities, kind_capacities
from tokjax.models.generation import Generator
from tokjax.models.native_patches import (
  Clip,
  NativeResolutionConfig,
  Patches,
)
from tokjax.models.vlm import Prompts
from tokjax.models.vlm_config import VisionLanguageConfig
from tokjax.reduce.stages import Stages
from tokjax.slots import Slots
from tokjax.tokens import Kind

# Merged patches that the images of a batch are padded to.
BUCKETS = tuple(sorted({n << i for i in range(20) for n in (4, 6)}))


def patches_of(image: Any, config: NativeResolutionConfig) -> Patches:
  """The same image, checked.

  Raises:
    ValueError: not patches, or of another size or dtype than the model's.
  """
  if not isinstance(image, Patches):
    raise ValueError(
      f"images: got {type(image).__name__}; this model takes Patches, as the"
      " preprocessing of the checkpoint makes them"
    )
  pixels, grid = np.asarray(image.pixels), tuple(map(int, image.grid))
  shape = (grid[0] * grid[1], config.patch_features)
  if pixels.shape != shape or any(n < 1 or n % config.merge for n in grid):
    raise ValueError(
      f"images: one has patches of shape {pixels.shape} for a grid of"
      f" {grid[0]} x {grid[1]}; must be [rows * columns,"
      f" {config.patch_features}], both sides multiples of {config.merge}"
    )
  if pixels.dtype.kind != "f":
    raise ValueError(
      f"images: one has dtype {pixels.dtype}; must be float, normalised as the"
      " preprocessing of the checkpoint does"
    )
  return Patches(pixels, np.asarray(grid, np.int32))


def clip_of(image: Any, config: NativeResolutionConfig) -> Clip[Patches]:
  """An image as a clip of one part, or a clip, checked.

  Raises:
    ValueError: see `patches_of`; a clip without parts, of parts of several
      sizes, or with a step below 0.
  """
  if not isinstance(image, Clip):
    return Clip((patches_of(image, config),))
  parts = tuple(patches_of(part, config) for part in image.parts)
  grids = sorted({tuple(part.grid.tolist()) for part in parts})
  if len(grids) != 1 or not image.step >= 0:
    raise ValueError(
      f"images: a Clip has {len(parts)} parts with the grids {grids} and"
      f" step={image.step}; must be one or more of one grid, and 0 or more"
    )
  return Clip(parts, image.step)


def parts_of(images: Sequence[vlm_prompts.Images]) -> int:
  """How many images there are, those in clips counted each."""
  return sum(
    len(x.parts) if isinstance(x, Clip) else 1
    for of_one in images
    for x in of_one
  )


def stages_of(
  config: VisionLanguageConfig, slots: Slots, room: int
) -> tuple[Stages, Stages]:
  """Reductions of the vision tower and of the projector.

  Args:
    config: of the model.
    slots: its slots.
    room: merged patches of an image, at most.
  """
  assert isinstance(config.vision, NativeResolutionConfig)
  seen = native_resolution.stages_of(
    slots.tower("vision"), room, config.vision.depth
  )
  for stage in seen[-1]:
    room = stage.outputs
  own = slots.tower("projector")
  return seen, vlm_tower.stages_of(own, room, 0, None, idle=True)


@functools.lru_cache(maxsize=256)
def remaining(
  config: VisionLanguageConfig, slots: Slots, room: int
) -> tuple[np.ndarray, int]:
  """Visual tokens that are left of an image.

  Args:
    config: of the model.
    slots: its slots.
    room: merged patches that images are padded to.

  Returns:
    How many real ones at most, by the number of merged patches (`[room + 1]`),
    and how many with those that are padding.
  """
  left, rows = np.arange(room + 1), room
  for tower in stages_of(config, slots, room):
    arriving = left
    for stage in (s for block in tower for s in block):
      due = stage.due(jnp.asarray(arriving), jnp.asarray(left))
      after = np.asarray(due.left)
      left = after + (stage.reduce.rest == "mean") * (after < left)
      rows = stage.outputs
  return left, rows


def starts_of(
  ids: Sequence[int],
  clips: Sequence[Clip[Patches]],
  counts: Sequence[Sequence[int]],
  config: VisionLanguageConfig,
) -> tuple[list[int], list[int], int]:
  """Where on all axes each token stands, or the first one of its image.

  Args:
    ids: with one placeholder for each image or clip.
    clips: of its images.
    counts: visual tokens of each part of each.
    config: of the model.

  Returns:
    One number for each token; how much later it is in time; the position of the
    token that follows.
  """
  assert isinstance(config.vision, NativeResolutionConfig)
  merge, found, times, start = config.vision.merge, [], [], 0
  images = iter(zip(clips, counts, strict=True))
  for token in ids:
    if token == config.image_token:
      clip, own = next(images)
      for time, count in zip(clip.times, own, strict=True):
        found += [start] * count
        times += [time] * count
      start += int(max(clip.parts[0].grid)) // merge
    else:
      found.append(start)
      times.append(0)
      start += 1
  # As `transformers` 5.24: texts go on behind the sides of a clip, however long
  # it is (its older releases: behind all positions), what is generated behind
  # all positions.
  latest = [a + b for a, b in zip(found, times, strict=True)]
  return found, times, max([start, *(at + 1 for at in latest)])


def pack(
  language: Generator,
  config: VisionLanguageConfig,
  slots: Slots,
  prompts: Sequence[vlm_prompts.Ids],
  images: Sequence[vlm_prompts.Images],
  buckets: tuple[int, ...],
  image_bucket: int,
) -> tuple[Prompts, Capacities]:
  """Padded prompts, and the room that they need for each kind.

  Args:
    language: the generator of the language model.
    config, slots: of the whole model.
    prompts: ids of each, with one placeholder for each image.
    images: of each prompt, `Patches` or `Clip`.
    buckets: merged patches that images are padded to, ascending.
    image_bucket: how many images the batch is padded to.

  Raises:
    ValueError: not as many placeholders as images, or an image that does not
      fit the model.
  """
  cfg = config.vision
  assert isinstance(cfg, NativeResolutionConfig)
  own = [[clip_of(x, cfg) for x in of_one] for of_one in images]
  every = [part for of_one in own for x in of_one for part in x.parts]
  sizes = [len(x.pixels) // cfg.merged for x in every]
  most = max(sizes, default=1)
  room = min([n for n in buckets if n >= most], default=most)
  table, rows = remaining(config, slots, room)
  left = lambda part: int(table[len(part.pixels) // cfg.merged])
  counts = [[[left(part) for part in x.parts] for x in o] for o in own]
  layouts = [[np.arange(sum(n)) for n in of_one] for of_one in counts]
  full = vlm_prompts.expand(prompts, layouts, config.image_token)
  tokens, length = language.pack(full)
  real = np.arange(tokens.shape[1])[None] < length[:, None]
  holder = real & (tokens == config.image_token)
  kind = np.where(holder, Kind.VISUAL, Kind.TEXT).astype(np.int32)
  capacities = kind_capacities(np.where(real, kind, -1), language.bucket)
  place = np.zeros(tokens.shape, np.int32)
  flat = [n for of_one in counts for of_clip in of_one for n in of_clip]
  place[holder] = np.concatenate(
    [np.zeros(0, int), *(i * rows + np.arange(n) for i, n in enumerate(flat))]
  )
  plain = Prompts(*map(jnp.asarray, (tokens, kind, place, length)))
  if not every:
    return plain, capacities
  start, time = np.zeros_like(place), np.zeros_like(place)
  following = np.zeros_like(length)
  for i, ids in enumerate(prompts):
    found, late, following[i] = starts_of(ids, own[i], counts[i], config)
    start[i, : len(found)], time[i, : len(late)] = found, late
  return dataclasses.replace(
    plain, images=batch(every, cfg, image_bucket, room),
    start=jnp.asarray(start), time=jnp.asarray(time),
    following=jnp.asarray(following),
  ), capacities  # fmt: skip


def batch(
  images: Sequence[Patches], config: NativeResolutionConfig, count: int,
  room: int,
) -> Patches:  # fmt: skip
  """Images padded to `count` of `room` merged patches each."""
  n = room * config.merged
  pixels = np.zeros((count, n, config.patch_features), np.float32)
  grid = np.zeros((count, 2), np.int32)
  for i, image in enumerate(images):
    pixels[i, : len(image.pixels)] = image.pixels
    grid[i] = image.grid
  if config.window is None:
    return Patches(jnp.asarray(pixels), jnp.asarray(grid))
  cut = [
    native_patches.windows_of(x.grid, config.merge, config.window)
    for x in images
  ]
  # A power of two, so that few numbers of windows are compiled for.
  many = 1 << (max(map(len, cut)) - 1).bit_length()
  windows = np.full((count, many, config.window**2), n, np.int32)
  for row, own in zip(windows, cut, strict=False):
    row[: len(own)] = np.where(own < 0, n, own)
  return Patches(*map(jnp.asarray, (pixels, grid, windows)))
