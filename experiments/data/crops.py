"""Crops of images of Pillow."""

import numpy as np
from PIL import Image


def random_resized_crop(
  image: Image.Image, size: int, min_area: float, rng: np.random.Generator
) -> Image.Image:
  """A part of random area and ratio (3/4 to 4/3), scaled to `size`."""
  width, height = image.size
  for _ in range(10):
    area = width * height * rng.uniform(min_area, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(width - w + 1))
      top = int(rng.integers(height - h + 1))
      box = (left, top, left + w, top + h)
      return image.resize((size, size), Image.Resampling.BICUBIC, box)
  return centre(image, size, 1.0)


def pad_crop(
  image: Image.Image, pad: int, rng: np.random.Generator
) -> Image.Image:
  """The image shifted by at most `pad` pixels each way; black comes in."""
  left, top = (int(x) for x in rng.integers(-pad, pad + 1, size=2))
  width, height = image.size
  return image.crop((left, top, left + width, top + height))


def centre(image: Image.Image, size: int, zoom: float) -> Image.Image:
  """The shorter side scaled to size * zoom, the middle `size` pixels cut."""
  width, height = image.size
  part = min(width, height) / zoom
  box = (
    (width - part) / 2, (height - part) / 2,
    (width + part) / 2, (height + part) / 2,
  )  # fmt: skip
  if image.size == (size, size) and zoom == 1.0:
    return image
  return image.resize((size, size), Image.Resampling.BICUBIC, box)
