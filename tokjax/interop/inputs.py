"""What makes the inputs of a model that takes images and text."""

import dataclasses
import math

import numpy as np
from PIL import Image

from tokjax.interop.images import to_pillow
from tokjax.interop.native_images import NativeResolutionPreprocessing
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.tokenizer import Tokenizer
from tokjax.models.any_resolution import Crops, Size, best_size


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
  """

  tokenizer: Tokenizer | None
  preprocessing: (
    Preprocessing | AnyResolution | NativeResolutionPreprocessing | None
  )
