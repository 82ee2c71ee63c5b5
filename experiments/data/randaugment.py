"""RandAugment (Cubuk et al., 2020) with Pillow's operations."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR,
    fillcolor=GREY,
  )  # fmt: skip


def _enhance(kind) -> Callable[[Image.Image, float], Image.Image]:
  return lambda image, s: kind(image).enhance(1 + 0.9 * s)


# Each takes an image and a strength in [-1, 1]; the sign matters where an
# operation has a direction.
OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
  lambda image, s: image,
  lambda image, s: ImageOps.autocontrast(image),
  lambda image, s: ImageOps.equalize(image),
  lambda image, s: ImageOps.invert(image),
  lambda image, s: image.rotate(
    30 * s, Image.Resampling.BILINEAR, fillcolor=GREY
  ),
  lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
  lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s)))),
  _enhance(ImageEnhance.Color),
  _enhance(ImageEnhance.Contrast),
  _enhance(ImageEnhance.Brightness),
  _enhance(ImageEnhance.Sharpness),
  lambda image, s: _affine(image, (1, 0.3 * s, 0, 0, 1, 0)),
  lambda image, s: _affine(image, (1, 0, 0, 0.3 * s, 1, 0)),
  lambda image, s: _affine(image, (1, 0, 0.3 * s * image.width, 0, 1, 0)),
  lambda image, s: _affine(image, (1, 0, 0, 0, 1, 0.3 * s * image.height)),
)


def rand_augment(
  image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator
) -> Image.Image:
  """Applies `layers` operations drawn at random.

  Args:
    image: RGB.
    magnitude: 0 to 10, the strength of every operation.
  """
  for i in rng.integers(len(OPERATIONS), size=layers):
    sign = -1.0 if rng.random() < 0.5 else 1.0
    image = OPERATIONS[i](image, sign * magnitude / 10)
  return image
