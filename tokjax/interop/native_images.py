"""Images as patches at their own resolution, as Qwen2-VL publishes it."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from tokjax.interop import fields, preprocessing_files
from tokjax.interop.fields import Json, Problems
from tokjax.interop.images import to_pillow
from tokjax.models.any_resolution import Size
from tokjax.models.native_patches import NativeResolutionConfig, Patches

# Longer images are refused, as by the reference.
LONGEST_RATIO = 200
PROCESSORS = ("Qwen2VL", "Qwen2_5_VL")
# What the processor does where its file is silent (transformers 5.24).
SILENT = {
  **preprocessing_files.ON,
  "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
  "default_to_square": False,
  "min_pixels": None,
  "max_pixels": None,
  "resample": 3,
  "image_mean": preprocessing_files.CLIP["image_mean"],
  "image_std": preprocessing_files.CLIP["image_std"],
  "patch_size": 14,
  "temporal_patch_size": 2,
  "merge_size": 2,
}


@dataclasses.dataclass(frozen=True)
class NativeResolutionPreprocessing:
  """Resize to whole blocks of patches, normalisation, patches in block order.

  Proportions are kept as far as blocks allow. The arithmetic is that of
  `smart_resize` in `transformers` 5.24.

  Attributes:
    mean, std: for each channel, of values in [0, 1].
    least, most: pixels that an image is resized to, at least and at most.
    patch_size: side of a patch in pixels.
    merge: patches on a side of a block.
    frames: that a patch spans; an image is repeated.
    interpolation: as in `Preprocessing`.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  least: int
  most: int
  patch_size: int = 14
  merge: int = 2
  frames: int = 2
  interpolation: str = "bicubic"

  def __post_init__(self):
    side = self.patch_size * self.merge
    if not 1 <= self.least <= self.most or self.most < side**2:
      raise ValueError(
        f"least={self.least}, most={self.most}: must be numbers of pixels,"
        f" least not above most, and most at least a block of {side} x {side}"
      )

  def size(self, height: int, width: int) -> Size:
    """Height and width that an image is resized to.

    Raises:
      ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > LONGEST_RATIO * min(height, width):
      raise ValueError(
        f"image of {width}x{height} pixels: one side must be at most"
        f" {LONGEST_RATIO} times the other; crop it"
      )
    side = self.patch_size * self.merge
    high, wide = (round(n / side) * side for n in (height, width))
    if high * wide > self.most:
      scale = math.sqrt(height * width / self.most)
      down = lambda n: max(side, math.floor(n / scale / side) * side)
      return down(height), down(width)
    if high * wide < self.least:
      scale = math.sqrt(self.least / (height * width))
      up = lambda n: math.ceil(n * scale / side) * side
      return up(height), up(width)
    return high, wide

  def __call__(self, image: np.ndarray | Image.Image) -> Patches:
    """An image as the model takes it; see `images.to_pillow` for errors."""
    image = to_pillow(image, len(self.mean))
    high, wide = self.size(image.height, image.width)
    method = getattr(Image.Resampling, self.interpolation.upper())
    image = image.resize((wide, high), method)
    x = np.asarray(image, np.float32).reshape(high, wide, -1)
    mean, std = (
      np.asarray(v, np.float32)[None, None] for v in (self.mean, self.std)
    )
    x = (x / np.float32(255) - mean) / std
    rows, columns = high // self.patch_size, wide // self.patch_size
    grid = np.array([rows, columns], np.int32)
    return Patches(self._cut(x, rows, columns), grid)

  def _cut(self, x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Patches of a normalised image, block by block, `[n, p]`."""
    side, merge, channels = self.patch_size, self.merge, x.shape[-1]
    x = x.reshape(
      rows // merge, merge, side, columns // merge, merge, side, channels
    )
    x = x.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    x = np.repeat(x, self.frames, axis=5)
    return x.reshape(rows * columns, -1)


def read(
  folder: pathlib.Path, config: NativeResolutionConfig
) -> NativeResolutionPreprocessing | None:
  """The preprocessing a folder states; None: it states none.

  Raises:
    ConfigError: it asks for something that is not done here, or makes other
      patches than the model takes.
  """
  found = preprocessing_files.stated(folder)
  if found is None:
    return None
  whole, file = found
  with fields.problems_of(file):
    return from_hf(whole, config)


def from_hf(
  whole: Json, config: NativeResolutionConfig
) -> NativeResolutionPreprocessing:
  """A preprocessor_config.json."""
  problems = Problems(preprocessing_files.HF_FILE)
  given = {key: value for key, value in whole.items() if value is not None}
  part, values = {**SILENT, **given}, {}
  unknown = set(given) - preprocessing_files.WITHOUT_EFFECT - set(SILENT)
  fields.refuse(whole, sorted(unknown), problems)
  names = {
    f"{name}ImageProcessor{kind}": name
    for name in PROCESSORS
    for kind in ("", "Fast", "Pil")
  }
  with problems.collect():
    fields.optional(fields.one_of(names))(part, "image_processor_type")
  preprocessing_files.required_steps(part, problems)
  with problems.collect():
    values["least"], values["most"] = limits(part)
  with problems.collect():
    values["interpolation"] = preprocessing_files.interpolation(part)
  values |= preprocessing_files.normalisation(part, config.channels, problems)
  for ours, theirs in (
    ("patch_size", "patch_size"),
    ("merge", "merge_size"),
    ("frames", "temporal_patch_size"),
  ):
    with problems.collect():
      values[ours] = fields.integer(part, theirs)
      wanted = getattr(config, ours)
      if values[ours] != wanted:
        raise fields.wrong(theirs, values[ours], f"{wanted}, as in config.json")
  return problems.build(NativeResolutionPreprocessing, values)


def limits(part: Json) -> tuple[int, int]:
  """Pixels at least and at most, in either spelling; `min_pixels` wins."""
  size: dict[str, Any] = {**SILENT["size"], **fields.mapping(part, "size")}
  for name, side in (
    ("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")
  ):  # fmt: skip
    if part[name] is not None:
      size[side] = fields.integer(part, name)
  if unknown := sorted(set(size) - set(SILENT["size"])):
    raise fields.wrong("size", part["size"], f"without {unknown}")
  return (
    fields.integer(size, "shortest_edge"), fields.integer(size, "longest_edge")
  )
