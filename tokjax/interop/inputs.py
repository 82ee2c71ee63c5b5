"""What makes the inputs of a model that takes images and text."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tokjax.interop.actions import Actions
from tokjax.interop.images import to_pillow
from tokjax.interop.native_images import NativeResolutionPreprocessing
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.prismatic_images import Stacked
from tokjax.interop.tokenizer import Tokenizer
from tokjax.models.any_resolution import Crops, Size, best_size
from tokjax.models.native_patches import Clip


@dataclasses.dataclass(frozen=True)
class AnyResolution:
  """Images of any size as a whole and in crops of the encoder's size.

  The whole image is resized to a square, whatever its proportions; for the
  crops it is resized within the best of the pinpoints and padded with black.

  Attributes:
    crop: resize and normalisation of a crop.
    pinpoints: heights and widths that images are brought to.
  """

  crop: Preprocessing
  pinpoints: tuple[Size, ...]

  def __call__(self, image: np.ndarray | Image.Image) -> Crops:
    """An image as the model takes it; see `images.to_pillow` for errors."""
    image = to_pillow(image, len(self.crop.mean))
    method = getattr(Image.Resampling, self.crop.interpolation.upper())
    side, size = self.crop.sides[0], (image.height, image.width)
    high, wide = best_size(size, self.pinpoints)
    new_high, new_wide = resized(size, (high, wide))
    canvas = Image.new(image.mode, (wide, high))
    small = image.resize((new_wide, new_high), method)
    canvas.paste(small, ((wide - new_wide) // 2, (high - new_high) // 2))
    parts = [image.resize((side, side), method)]
    parts += [
      canvas.crop((left, top, left + side, top + side))
      for top in range(0, high, side)
      for left in range(0, wide, side)
    ]
    return Crops(np.stack([self.crop(part) for part in parts]), size)


@dataclasses.dataclass(frozen=True)
class OneOrMany(AnyResolution):
  """The only image of a prompt in crops, others seen once (LLaVA-OneVision).

  Attributes:
    frame: resize and normalisation of a frame of a video; None: as of a crop.
  """

  frame: Preprocessing | None = None

  def once(self, image: np.ndarray | Image.Image) -> Crops:
    """An image of a prompt with several: padded to a square, then resized.

    The padding has the mean colour. See `images.to_pillow` for errors.
    """
    image = to_pillow(image, len(self.crop.mean))
    side = max(image.size)
    colour = tuple(int(x * 255) for x in self.crop.mean)
    colour = colour if len(colour) > 1 else colour[0]
    canvas = Image.new(image.mode, (side, side), colour)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    canvas.paste(image, (left, top))
    size = (image.height, image.width)
    return Crops(self.crop(canvas)[None], size)

  def video(
    self, frames: Sequence[np.ndarray | Image.Image]
  ) -> Clip[np.ndarray]:
    """A video of one placeholder; frames are resized to a square each.

    See `images.to_pillow` for errors.
    """
    made = self.frame or self.crop
    return Clip(tuple(made(frame) for frame in frames))


@dataclasses.dataclass(frozen=True)
class Tiled:
  """Images in tiles of the encoder's size, then as a whole (InternVL).

  The image is resized to the grid of tiles whose proportions are nearest; one
  that is a single tile is seen once.

  Attributes:
    crop: resize and normalisation of a tile.
    least, most: tiles of an image.
  """

  crop: Preprocessing
  least: int = 1
  most: int = 12

  def __post_init__(self):
    high, wide = self.crop.sides
    if self.crop.keep_aspect or self.crop.resized_sides != (high, wide):
      raise ValueError("crop: must resize to its size without a centre crop")
    if not 1 <= self.least <= self.most:
      raise ValueError(
        f"least={self.least}, most={self.most}: must be numbers of tiles of 1"
        " or more, least not above most"
      )

  def grid(self, size: Size) -> Size:
    """Rows and columns of tiles for an image of this height and width.

    Of grids whose proportions are equally near, one with more tiles is taken
    if the image has more than half of its pixels.
    """
    (height, width), (high, wide) = size, self.crop.sides
    count = range(1, self.most + 1)
    every = [(y, x) for x in count for y in count]
    fit = [(y, x) for y, x in every if self.least <= x * y <= self.most]
    best, nearest = (1, 1), math.inf
    for rows, columns in sorted(fit, key=math.prod):
      apart = abs(width / height - columns / rows)
      fills = height * width > 0.5 * high * wide * columns * rows
      if apart < nearest or (apart == nearest and fills):
        best, nearest = (rows, columns), apart
    return best

  def __call__(self, image: np.ndarray | Image.Image) -> Crops:
    """An image as the model takes it; see `images.to_pillow` for errors."""
    image = to_pillow(image, len(self.crop.mean))
    method = getattr(Image.Resampling, self.crop.interpolation.upper())
    size, (high, wide) = (image.height, image.width), self.crop.sides
    rows, columns = self.grid(size)
    canvas = image.resize((columns * wide, rows * high), method)
    corners = [(x, y) for y in range(rows) for x in range(columns)]
    parts = [
      canvas.crop((x * wide, y * high, (x + 1) * wide, (y + 1) * high))
      for x, y in corners
    ]
    if len(parts) > 1:
      parts.append(image.resize((wide, high), method))
    return Crops(np.stack([self.crop(part) for part in parts]), size)


def resized(size: Size, room: Size) -> Size:
  """Height and width of an image that fills one side of a room."""
  (height, width), (high, wide) = size, room
  if wide / width < high / height:
    return min(math.ceil(height * (wide / width)), high), wide
  return high, min(math.ceil(width * (high / height)), wide)


@dataclasses.dataclass(frozen=True)
class ImagesAndText:
  """A tokenizer and the preprocessing of images.

  Attributes:
    tokenizer: None if the folder has none.
    preprocessing: None if the folder does not state it.
    actions: what the last tokens stand for in a model of actions; None: it is
      none.
    image_second: images stand behind the first token of a prompt, and no text
      says where (Prismatic).
  """

  tokenizer: Tokenizer | None
  preprocessing: (
    Preprocessing
    | AnyResolution
    | Tiled
    | NativeResolutionPreprocessing
    | Stacked
    | None
  )
  actions: Actions | None = None
  image_second: bool = False
