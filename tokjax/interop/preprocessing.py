"""What a checkpoint expects to be done to an image before it sees it."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from tokjax.interop import files

HF_FILE = "preprocessor_config.json"
# Pillow's numbers, as transformers stores them.
RESAMPLE = {
  0: "nearest",
  1: "lanczos",
  2: "bilinear",
  3: "bicubic",
  4: "box",
  5: "hamming",
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """Resize, centre crop and normalisation of an image.

  Attributes:
    mean, std: for each channel, of values in [0, 1].
    image_size: side of the result in pixels.
    interpolation: a name in `RESAMPLE`.
    crop_fraction: side of the crop over the side resized to.
    keep_aspect: the shorter side is resized to `image_size / crop_fraction`;
      otherwise both are.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_size: int
  interpolation: str = "bicubic"
  crop_fraction: float = 1.0
  keep_aspect: bool = True

  def __post_init__(self):
    if self.interpolation not in RESAMPLE.values():
      raise ValueError(
        f"interpolation={self.interpolation!r}: must be one of"
        f" {sorted(RESAMPLE.values())}"
      )
    if not 0 < self.crop_fraction <= 1:
      raise ValueError(f"crop_fraction={self.crop_fraction}: must be in (0, 1]")

  @property
  def resize_to(self) -> int:
    """Side before the crop, in pixels."""
    return math.floor(self.image_size / self.crop_fraction + 1e-6)

  def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray:
    """An image as the model takes it.

    Args:
      image: uint8 `[height, width, 3]`, or of Pillow.

    Returns:
      float32 `[image_size, image_size, channels]`.
    """
    if not isinstance(image, Image.Image):
      image = Image.fromarray(np.asarray(image))
    image = image.convert("RGB" if len(self.mean) == 3 else "L")
    width, height = image.size
    short = self.resize_to
    wide, high = short, short
    if self.keep_aspect:
      wide = short * width // height if width > height else short
      high = short * height // width if height > width else short
    method = getattr(Image.Resampling, self.interpolation.upper())
    image = image.resize((wide, high), method)
    left, top = (wide - self.image_size) // 2, (high - self.image_size) // 2
    image = image.crop(
      (left, top, left + self.image_size, top + self.image_size)
    )
    x = np.asarray(image, np.float32).reshape(
      self.image_size, self.image_size, -1
    )
    mean, std = (
      np.asarray(v, np.float32)[None, None] for v in (self.mean, self.std)
    )
    return (x / np.float32(255) - mean) / std


def read(folder: pathlib.Path) -> Preprocessing | None:
  """The preprocessing a folder states, in either layout; None: it states none.

  Raises:
    ValueError: it asks for something that `Preprocessing` does not do.
  """
  if (folder / HF_FILE).exists():
    return from_hf(files.read_json(folder / HF_FILE))
  whole = files.read_json(folder / "config.json")
  if "mean" in whole.get("pretrained_cfg", {}):
    return from_timm(whole["pretrained_cfg"])
  return None


def from_hf(whole: Mapping[str, Any]) -> Preprocessing:
  """A preprocessor_config.json."""
  for key, wanted in (("do_resize", True), ("do_rescale", True)):
    if whole.get(key, wanted) != wanted:
      raise ValueError(f"{HF_FILE}: {key}={whole[key]} is not supported")
  factor = whole.get("rescale_factor", 1 / 255)
  if not math.isclose(factor, 1 / 255, rel_tol=1e-5):
    raise ValueError(f"{HF_FILE}: rescale_factor={factor} is not supported")
  kind = whole.get("image_processor_type", whole.get("feature_extractor_type"))
  size = whole["size"]
  if isinstance(size, int):
    # CLIP alone means the shorter side by a number.
    clip = "CLIP" in (kind or "")
    size = {"shortest_edge" if clip else "height": size}
  keep_aspect = "shortest_edge" in size
  resized = size["shortest_edge"] if keep_aspect else size["height"]
  if size.get("width", resized) != resized:
    raise ValueError(f"{HF_FILE}: size={size}: images must be square")
  crop = resized
  if whole.get("do_center_crop", "crop_size" in whole):
    crop = whole["crop_size"]
    crop = crop if isinstance(crop, int) else crop["height"]
  normal = whole.get("do_normalize", True)
  return Preprocessing(
    mean=tuple(whole["image_mean"]) if normal else (0.0,) * 3,
    std=tuple(whole["image_std"]) if normal else (1.0,) * 3,
    image_size=crop,
    interpolation=RESAMPLE[whole.get("resample", 2)],
    crop_fraction=crop / resized,
    keep_aspect=keep_aspect,
  )


def to_hf(value: Preprocessing) -> dict[str, Any]:
  """A preprocessor_config.json."""
  side, crop = value.resize_to, value.image_size
  numbers = {name: number for number, name in RESAMPLE.items()}
  return {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_center_crop": side != crop or value.keep_aspect,
    "crop_size": {"height": crop, "width": crop},
    "image_mean": list(value.mean),
    "image_std": list(value.std),
    # This class obeys every key here; the one of ViT never crops.
    "image_processor_type": "CLIPImageProcessor",
    "resample": numbers[value.interpolation],
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": side}
    if value.keep_aspect
    else {"height": side, "width": side},
  }


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
  """The pretrained_cfg of a config.json of timm."""
  if config.get("crop_mode", "center") != "center":
    raise ValueError(
      f"config.json: crop_mode={config['crop_mode']!r} is not supported"
    )
  return Preprocessing(
    mean=tuple(config["mean"]),
    std=tuple(config["std"]),
    image_size=config["input_size"][-1],
    interpolation=config.get("interpolation", "bicubic"),
    crop_fraction=config.get("crop_pct", 1.0),
  )


def to_timm(value: Preprocessing) -> dict[str, Any]:
  """The part of pretrained_cfg that says how images are made.

  Raises:
    ValueError: it squashes images, which timm's configuration cannot say.
  """
  if not value.keep_aspect:
    raise ValueError(
      "preprocessing: keep_aspect=False cannot be written in timm's layout"
    )
  return {
    "mean": list(value.mean),
    "std": list(value.std),
    "interpolation": value.interpolation,
    "crop_pct": value.crop_fraction,
    "crop_mode": "center",
  }
