"""What a checkpoint expects to be done to an image before it sees it."""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from tokjax.interop import fields
from tokjax.interop.images import to_pillow

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
ROUNDINGS = ("floor", "half_even")
# Of a side. Far above every published size; an image of this side is 3 GiB.
MOST_PIXELS = 2**15


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Resize, centre crop and normalisation of an image.

  Attributes:
    mean, std: for each channel (1 or 3), of values in [0, 1].
    image_size: of the result in pixels; height and width where they differ.
    interpolation: one of `INTERPOLATIONS`, as Pillow names and defines them.
    crop_fraction: side of the crop over the side resized to.
    keep_aspect: the image is resized so that it covers `resize_to` and keeps
      its proportions (a square one: the shorter side is resized); otherwise
      both sides are resized to it.
    crop_rounding: of the corner, where the crop cannot be in the middle:
      "floor" (`transformers`) or "half_even" (timm, torchvision).
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_size: int | tuple[int, int]
  interpolation: str = "bicubic"
  crop_fraction: float = 1.0
  keep_aspect: bool = True
  crop_rounding: Literal["floor", "half_even"] = "floor"

  def __post_init__(self):
    problems = fields.Problems("preprocessing")
    found, part = problems.found, vars(self)
    for name in ("mean", "std"):
      with problems.collect():
        if len(fields.numbers(part, name)) not in (1, 3):
          raise fields.wrong(name, part[name], "of 1 or 3 channels")
        if name == "std" and min(self.std) <= 0:
          raise fields.wrong(name, self.std, "above 0 in every channel")
    if not found and len(self.mean) != len(self.std):
      found.append(f"mean={self.mean}, std={self.std}: must be equally long")
    with problems.collect():
      object.__setattr__(self, "image_size", fields.size(part, "image_size"))
    for name, allowed in (
      ("interpolation", INTERPOLATIONS),
      ("crop_rounding", ROUNDINGS),
    ):
      if part[name] not in allowed:
        found.append(f"{name}={part[name]!r}: must be one of {sorted(allowed)}")
    fraction = self.crop_fraction
    if not fields.is_number(fraction) or not 0 < fraction <= 1:
      found.append(f"crop_fraction={fraction}: must be in (0, 1]")
    elif not found and max(self.sides) / fraction > MOST_PIXELS:
      found.append(
        f"image_size={self.image_size}, crop_fraction={fraction}: must make"
        f" resize_to at most {MOST_PIXELS} pixels"
      )
    problems.check()

  @property
  def sides(self) -> tuple[int, int]:
    """Height and width of the result, in pixels."""
    size = self.image_size
    return size if isinstance(size, tuple) else (size, size)

  @property
  def resize_to(self) -> int | tuple[int, int]:
    """Side before the crop, in pixels; height and width where they differ."""
    high, wide = self.resized_sides
    return high if high == wide else (high, wide)

  @property
  def resized_sides(self) -> tuple[int, int]:
    """Height and width before the crop, in pixels."""
    height, width = self.sides
    down = lambda side: math.floor(side / self.crop_fraction)
    return down(height), down(width)

  @property
  def rounds(self) -> bool:
    """True if there are images whose crop cannot be exactly in the middle."""
    pairs = zip(self.resized_sides, self.sides, strict=True)
    return self.keep_aspect or any((a - b) % 2 for a, b in pairs)

  def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray:
    """An image as the model takes it.

    Args:
      image: see `images.to_pillow`.

    Returns:
      float32 `[height, width, channels]`.

    Raises:
      ValueError: an image of unknown range or order of channels.
    """
    image = to_pillow(image, len(self.mean))
    wide, high = self._size_of(*image.size)
    method = getattr(Image.Resampling, self.interpolation.upper())
    image = image.resize((wide, high), method)
    height, width = self.sides
    left, top = self._corner(wide - width), self._corner(high - height)
    image = image.crop((left, top, left + width, top + height))
    x = np.asarray(image, np.float32).reshape(height, width, -1)
    mean, std = (
      np.asarray(v, np.float32)[None, None] for v in (self.mean, self.std)
    )
    return (x / np.float32(255) - mean) / std

  def _size_of(self, width: int, height: int) -> tuple[int, int]:
    """Width and height that an image is resized to."""
    high, wide = self.resized_sides
    if not self.keep_aspect:
      return wide, high
    if high != wide:
      ratio = min(height / high, width / wide)
      return round(width / ratio), round(height / ratio)
    short = high
    if width > height:
      return short * width // height, short
    return short, short * height // width

  def _corner(self, over: int) -> int:
    """Pixels left out before the crop, of `over` along an axis."""
    # Python rounds half to even.
    return over // 2 if self.crop_rounding == "floor" else round(over / 2)


def fraction(crop: int, resized: int) -> float:
  """`crop_fraction` for which `resize_to` is exactly `resized`."""
  value = crop / resized
  while math.floor(crop / value) < resized:
    value = math.nextafter(value, 0)
  return value
