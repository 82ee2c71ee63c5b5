"""Prompts with images, laid out for a vision-language model on the host.

A layout says where each token of an image comes from: a row among the visual
tokens of its crops, or a newline. The placeholder of an image becomes as many
tokens as its layout has.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokjax.models import any_resolution
from tokjax.models.any_resolution import Crops
from tokjax.models.native_patches import Clip, Patches
from tokjax.models.vit import ViTConfig
from tokjax.models.vlm import Mix, Prompts
from tokjax.models.vlm_config import VisionLanguageConfig
from tokjax.signals import Origins
from tokjax.tokens import Kind

Ids = Sequence[int]
Images = Sequence[np.ndarray | Crops | Patches | Clip]


def frames_of(clip: Clip[np.ndarray], config: VisionLanguageConfig) -> Crops:
  """A video as crops that are its frames.

  Raises:
    ValueError: a model that pools no frames, no frames, frames of several
      sizes, or a step in time, which positions of one axis do not have.
  """
  cfg = config.vision
  assert isinstance(cfg, ViTConfig)
  if config.most_crops is None:
    raise ValueError(
      "images: got Clip; this model has no rule for videos: give a placeholder"
      " and an image for each frame"
    )
  parts = [np.asarray(part) for part in clip.parts]
  shapes = sorted({part.shape for part in parts})
  if len(shapes) != 1 or clip.step != 1:
    raise ValueError(
      f"images: a Clip has {len(parts)} parts of the shapes {shapes} and"
      f" step={clip.step}; must be one or more of one shape, and 1, since"
      " positions of this model have no axis of time"
    )
  return Crops(np.stack(parts), cfg.image_sides, frames=True)


def crops_of(
  image: np.ndarray | Crops | Clip, config: VisionLanguageConfig
) -> Crops:
  """An image as crops; one that is seen once is its own only crop.

  Raises:
    ValueError: an image of another size or dtype than the model's, or not in
      the crops that its size asks for; see `frames_of`.
  """
  cfg = config.vision
  assert isinstance(cfg, ViTConfig)
  if isinstance(image, Clip):
    image = frames_of(image, config)
  shape = (*cfg.image_sides, config.channels)
  cut, crops = isinstance(image, Crops), config.pinpoints or config.tiled
  if cut != bool(crops):
    raise ValueError(
      f"images: got {type(image).__name__}; this model takes"
      f" {'Crops' if crops else 'arrays'}, as the preprocessing of"
      " the checkpoint makes them"
    )
  made = image
  if not isinstance(made, Crops):
    made = Crops(np.asarray(made)[None], shape[:2])
  if not len(made.pixels):
    raise ValueError("images: one has no crops; must be at least one")
  if made.pixels.shape[1:] != shape:
    raise ValueError(
      f"images: one has shape {made.pixels.shape[1:]}; must be {shape}, as the"
      " preprocessing of the checkpoint makes it"
    )
  if made.pixels.dtype.kind != "f":
    raise ValueError(
      f"images: one has dtype {made.pixels.dtype}; must be float, normalised as"
      " the preprocessing of the checkpoint does"
    )
  single = config.most_crops is not None and len(made.pixels) == 1
  if config.pinpoints and not single and not made.frames:
    size = any_resolution.best_size(made.size, config.pinpoints)
    many = 1 + size[0] * size[1] // shape[0] ** 2
    if len(made.pixels) != many:
      raise ValueError(
        f"images: one of size {made.size} has {len(made.pixels)} crops; must be"
        f" {many}"
      )
  return made


def layout_of(
  crops: Crops, config: VisionLanguageConfig, count: int
) -> np.ndarray:
  """Where each token of an image comes from, see `any_resolution.layout`.

  Tokens that are means have several entries, `[m, 4]`; see `weights_of`.

  Where a recipe leaves fewer than a grid of tokens of a crop, there are no rows
  to end: the tokens of the crops stand one after the other, without newlines,
  and those of the padding stay. Frames of a video are not pooled then.

  Args:
    crops: the image.
    config: of the model.
    count: visual tokens of a crop.
  """
  cfg = config.vision
  assert isinstance(cfg, ViTConfig)
  if not config.pinpoints or count != cfg.num_patches:
    return np.arange(count * len(crops.pixels))
  if config.most_crops is not None:
    return _mixed(crops, config)[0]
  return any_resolution.layout(
    crops.size, config.pinpoints, cfg.image_sides[0], cfg.grid
  )


def origins_of(
  crops: Crops,
  config: VisionLanguageConfig,
  layout: np.ndarray,
  image: int,
) -> np.ndarray:
  """Where the tokens of an image come from, see `Origins`, `[m, 8]`.

  Args:
    crops: the image.
    config: of the model.
    layout: see `layout_of`, of all patches.
    image: its number in its prompt.
  """
  cfg: Any = config.vision  # Of native resolution is refused: see `vlm_seen`.
  (rows, columns), high, wide = cfg.grid, 0, 0
  if config.pinpoints:
    side = cfg.image_sides[0]
    size = any_resolution.best_size(crops.size, config.pinpoints)
    high, wide = (n // side for n in size)
  crop, patch = np.divmod(layout, rows * columns)
  every = np.broadcast_arrays(
    image, crop, patch // columns, patch % columns, high, wide, rows, columns
  )
  patches = (layout != any_resolution.NEWLINE)[:, None]
  return np.where(patches, np.stack(every, axis=-1), -1).astype(np.int32)


def with_origins(
  prompts: Prompts, origins: Sequence[Sequence[np.ndarray]]
) -> Prompts:
  """Prompts that say where their visual tokens come from.

  Args:
    prompts: packed.
    origins: `origins_of` of the images of each prompt.
  """
  kind = np.asarray(prompts.kind)
  holder = (kind == Kind.VISUAL) | (kind == Kind.NEWLINE)
  full = np.full((*kind.shape, len(Origins._fields)), -1, np.int32)
  rows = [x for own in origins for x in own]
  if rows:
    full[holder] = np.concatenate(rows)
  return dataclasses.replace(prompts, origin=jnp.asarray(full))


def weights_of(
  crops: Crops, config: VisionLanguageConfig, count: int
) -> np.ndarray | None:
  """Weights of the entries of `layout_of`; None: each token has one entry."""
  cfg = config.vision
  assert isinstance(cfg, ViTConfig)
  if config.most_crops is None or count != cfg.num_patches:
    return None
  return _mixed(crops, config)[1]


def _mixed(
  crops: Crops, config: VisionLanguageConfig
) -> tuple[np.ndarray, np.ndarray]:
  """`any_resolution.mixed_layout`, also of videos and of what is seen once."""
  cfg = config.vision
  assert isinstance(cfg, ViTConfig) and config.most_crops is not None
  if crops.frames:
    return any_resolution.video_layout(len(crops.pixels), cfg.grid)
  if len(crops.pixels) == 1:
    rows = [*range(cfg.num_patches), any_resolution.NEWLINE]
    weight = np.tile(np.array([1.0, 0, 0, 0], np.float32), (len(rows), 1))
    return np.repeat(np.array(rows)[:, None], 4, axis=1), weight
  return any_resolution.mixed_layout(
    crops.size, config.pinpoints, cfg.image_sides[0], cfg.grid,
    config.most_crops,
  )  # fmt: skip


def expand(
  prompts: Sequence[Ids],
  layouts: Sequence[Sequence[np.ndarray]],
  image_token: int,
) -> list[list[int]]:
  """Prompts in which each placeholder is repeated for every token of its image.

  Args:
    prompts: ids, with one placeholder for each image.
    layouts: of the images of each prompt, in the order of the placeholders.
    image_token: the placeholder.

  Raises:
    ValueError: not as many placeholders as images.
  """
  if len(layouts) != len(prompts):
    raise ValueError(
      f"images: has {len(layouts)} entries for {len(prompts)} prompts; give a"
      " list of images for each prompt, an empty one for those without"
    )
  found = []
  for i, (ids, own) in enumerate(zip(prompts, layouts, strict=True)):
    holders = sum(token == image_token for token in ids)
    if holders != len(own):
      raise ValueError(
        f"prompt {i} has {holders} placeholders (id {image_token}) for"
        f" {len(own)} images; put one placeholder where each image belongs"
      )
    left = iter(own)
    full: list[int] = []
    for token in ids:
      full += [token] * (len(next(left)) if token == image_token else 1)
    found.append(full)
  return found


def pack(
  tokens: np.ndarray,
  length: np.ndarray,
  images: Sequence[Crops],
  layouts: Sequence[np.ndarray],
  image_token: int,
  count: int,
  room: int,
  weights: Sequence[np.ndarray | None] = (),
) -> Prompts:
  """Padded ids and images as `Prompts`.

  Args:
    tokens, length: expanded prompts, padded at their end.
    images: of all prompts, in order.
    layouts: of these images.
    image_token: the placeholder.
    count: visual tokens of a crop.
    room: crops of the batch, padding included.
    weights: of these images, see `weights_of`; (): none has any.
  """
  real = np.arange(tokens.shape[1])[None] < length[:, None]
  holder = real & (tokens == image_token)
  first = np.cumsum([0, *(len(image.pixels) for image in images)]) * count
  rows = [
    np.where(own == any_resolution.NEWLINE, own, own + start)
    for own, start in zip(layouts, first[:-1], strict=True)
  ]
  place = np.zeros(tokens.shape, np.int32)
  place[holder] = np.concatenate(
    [np.zeros(0, int), *(own if own.ndim == 1 else own[:, 0] for own in rows)]
  )
  newline = place == any_resolution.NEWLINE
  kind = np.where(holder, Kind.VISUAL, Kind.TEXT)
  kind = np.where(newline, Kind.NEWLINE, kind).astype(np.int32)
  place = np.where(newline, 0, place)
  made = Prompts(*map(jnp.asarray, (tokens, kind, place, length)))
  if not images:
    return made
  every = np.concatenate([image.pixels for image in images])
  pixels = np.zeros((room, *every.shape[1:]), np.float32)
  pixels[: len(every)] = every
  made = dataclasses.replace(made, images=jnp.asarray(pixels))
  mixed = [own for own in weights if own is not None]
  if not mixed:
    return made
  places = np.zeros((*tokens.shape, 4), np.int32)
  places[holder] = np.maximum(np.concatenate(rows), 0)
  weight = np.zeros(places.shape, np.float32)
  weight[holder] = np.concatenate(mixed)
  mix = Mix(jnp.asarray(places), jnp.asarray(weight))
  return dataclasses.replace(made, mix=mix)
