"""Images of Prismatic and OpenVLA: resized for each encoder, then stacked.

As PrismaticImageProcessor of openvla/openvla (c8f03f4) makes them,
prismatic/extern/hf/processing_prismatic.py.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from tokjax.interop import fields, preprocessing_files
from tokjax.interop.fields import Json, Problems
from tokjax.interop.images import to_pillow
from tokjax.interop.preprocessing import INTERPOLATIONS, Preprocessing

STRATEGIES = {
  # Whether proportions are kept, and whether images are padded to a square.
  "resize-naive": (False, False),
  "resize-crop": (True, False),
  "letterbox": (True, True),
}


KNOWN = {
  "image_resize_strategy", "input_sizes", "interpolations", "means", "stds",
  "use_fused_vision_backbone", "auto_map", "tvf_do_letterbox",
  # As the class writes them they follow from the others.
  "tvf_resize_params", "tvf_crop_params", "tvf_normalize_params",
  "tvf_letterbox_fill",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stacked:
  """An image once for each encoder, one behind the other by channel.

  Attributes:
    parts: for each encoder.
    letterbox: images are first padded to a square, with the mean colour of the
      last encoder.
  """

  parts: tuple[Preprocessing, ...]
  letterbox: bool = False

  def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray:
    """An image as the model takes it; see `images.to_pillow` for errors.

    Returns:
      float32 `[height, width, channels of all encoders]`.
    """
    image = to_pillow(image, len(self.parts[0].mean))
    if self.letterbox:
      colour = tuple(int(x * 255) for x in self.parts[-1].mean)
      image = padded(image, colour)
    return np.concatenate([part(image) for part in self.parts], axis=-1)


def padded(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
  """An image with equal borders on both sides, square up to one pixel."""
  side = max(image.size)
  left, top = (side - image.width) // 2, (side - image.height) // 2
  size = (image.width + 2 * left, image.height + 2 * top)
  canvas = Image.new(image.mode, size, colour if len(colour) > 1 else colour[0])
  canvas.paste(image, (left, top))
  return canvas


def read(folder: pathlib.Path, channels: int) -> Stacked | None:
  """The preprocessing of a folder; None: it states none.

  Args:
    folder: of the checkpoint.
    channels: of images, those of all encoders.

  Raises:
    ConfigError: lists every value that cannot be followed.
  """
  found = preprocessing_files.stated(folder)
  if found is None:
    return None
  whole, file = found
  problems = Problems(file)
  unknown = set(whole) - KNOWN - preprocessing_files.WITHOUT_EFFECT
  fields.refuse(whole, sorted(unknown), problems)
  strategy, count, parts = (True, True), 1, []
  with problems.collect():
    named = {"image_resize_strategy": "letterbox", **whole}
    strategy = fields.one_of(STRATEGIES)(named, "image_resize_strategy")
    count = len(whole.get("input_sizes") or [0])
  for i in range(count):
    with problems.collect():
      parts.append(part_of(whole, i, strategy[0]))
  with problems.collect():
    fill = whole.get("tvf_do_letterbox", strategy[1])
    if fill != strategy[1]:
      raise fields.wrong("tvf_do_letterbox", fill, f"{strategy[1]}")
    if (have := sum(len(part.mean) for part in parts)) != channels:
      raise fields.wrong(
        "input_sizes", whole.get("input_sizes"), f"of {channels} channels in"
        f" all, which the encoders take, not {have}",
      )  # fmt: skip
  return problems.build(
    Stacked, {"parts": tuple(parts), "letterbox": strategy[1]}
  )


def part_of(whole: Json, i: int, keep_aspect: bool) -> Preprocessing:
  """What is done for one encoder."""
  default: dict[str, Any] = {
    "input_sizes": [3, 224, 224], "interpolations": "bicubic",
    "means": [0.5] * 3, "stds": [0.5] * 3,
  }  # fmt: skip
  own = {}
  for name, usual in default.items():
    value = whole.get(name)
    value = [usual] if value is None else value
    if not isinstance(value, list) or len(value) <= i:
      raise fields.wrong(name, value, "a list with an entry an encoder")
    own[name] = value[i]
  size = fields.input_size(own, "input_sizes")
  names = {name: name for name in INTERPOLATIONS}
  numbers = {
    name: fields.per_channel(
      name, fields.numbers(own, name), size[0], positive=name == "stds"
    )
    for name in ("means", "stds")
  }
  return Preprocessing(
    numbers["means"], numbers["stds"], size[1:],
    fields.one_of(names)(own, "interpolations"), keep_aspect=keep_aspect,
    crop_rounding="half_even",
  )  # fmt: skip
