"""Prompts with images, laid out for a vision-language model on the host."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tokjax.models.vlm import Prompts, VisionLanguageConfig
from tokjax.tokens import Kind

Ids = Sequence[int]
Images = Sequence[np.ndarray]


def expand(
  prompts: Sequence[Ids], images: Sequence[Images], image_token: int, count: int
) -> list[list[int]]:
  """Prompts in which each placeholder has become `count` of them.

  Args:
    prompts: ids, with one placeholder for each image.
    images: of each prompt, in the order of the placeholders.
    image_token: the placeholder.
    count: visual tokens of an image.

  Raises:
    ValueError: not as many placeholders as images.
  """
  if len(images) != len(prompts):
    raise ValueError(
      f"images: has {len(images)} entries for {len(prompts)} prompts; give a"
      " list of images for each prompt, an empty one for those without"
    )
  found = []
  for i, (ids, own) in enumerate(zip(prompts, images, strict=True)):
    holders = sum(token == image_token for token in ids)
    if holders != len(own):
      raise ValueError(
        f"prompt {i} has {holders} placeholders (id {image_token}) for"
        f" {len(own)} images; put one placeholder where each image belongs"
      )
    repeats = (count if token == image_token else 1 for token in ids)
    found.append(
      [t for t, n in zip(ids, repeats, strict=True) for _ in range(n)]
    )
  return found


def stacked(
  images: Sequence[Images], config: VisionLanguageConfig, room: int
) -> np.ndarray | None:
  """All images one after the other, zeros up to `room`; None: there are none.

  Raises:
    ValueError: an image of another size than the model's.
  """
  cfg = config.vision
  shape = (*cfg.image_sides, cfg.channels)
  every = [np.asarray(image) for own in images for image in own]
  if not every:
    return None
  for i, image in enumerate(every):
    if image.shape != shape:
      raise ValueError(
        f"image {i} of the batch has shape {image.shape}; must be {shape},"
        " float, as the preprocessing of the checkpoint makes it"
      )
    if image.dtype.kind != "f":
      raise ValueError(
        f"image {i} of the batch has dtype {image.dtype}; must be float,"
        " normalised as the preprocessing of the checkpoint does"
      )
  out = np.zeros((room, *shape), np.float32)
  out[: len(every)] = every
  return out


def laid_out(
  tokens: np.ndarray, length: np.ndarray, image_token: int
) -> tuple[np.ndarray, np.ndarray]:
  """Kinds of padded prompts and places of their visual tokens, `[b, n]`."""
  real = np.arange(tokens.shape[1])[None] < length[:, None]
  visual = real & (tokens == image_token)
  kind = np.where(visual, Kind.VISUAL, Kind.TEXT).astype(np.int32)
  place = np.cumsum(visual.reshape(-1)).reshape(visual.shape) - 1
  return kind, np.where(visual, place, 0).astype(np.int32)


def pack(
  tokens: np.ndarray,
  length: np.ndarray,
  images: Sequence[Images],
  config: VisionLanguageConfig,
  room: int,
) -> Prompts:
  """Padded ids and images as `Prompts`.

  Args:
    tokens, length: expanded prompts, padded at their end.
    images: of each prompt.
    config: of the model.
    room: images of the batch, padding included.
  """
  kind, place = laid_out(tokens, length, config.image_token)
  pixels = stacked(images, config, room)
  made = Prompts(*map(jnp.asarray, (tokens, kind, place, length)))
  if pixels is None:
    return made
  return dataclasses.replace(made, images=jnp.asarray(pixels))
