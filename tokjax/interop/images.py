"""Images of any file or array as 8-bit RGB or grey.

Nothing is guessed: an image whose range or order of channels is not known is
refused.
"""

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112  # the tag of EXIF
# Pillow reads 16-bit PNG and PNM as 32-bit integers in some versions.
SIXTEEN_BIT = ("PNG", "PPM")


def to_pillow(
  image: Image.Image | np.ndarray, channels: int = 3
) -> Image.Image:
  """An 8-bit Pillow image, upright and opaque.

  Args:
    image: of Pillow, in any mode of known range; or uint8 or uint16 `[h, w]`
      or `[h, w, c]`, c in 1 (grey), 3 (RGB) and 4 (RGB and alpha).
    channels: of the result, 3 (RGB) or 1 (grey).

  Returns:
    The image, rotated as its EXIF orientation says; 16-bit values over 257,
    rounded; transparent pixels on white (Pillow's `convert` would show the
    colour that is stored below the transparency, often black).

  Raises:
    ValueError: another dtype, shape or mode; or no pixels.
  """
  if not isinstance(image, Image.Image):
    image = from_array(np.asarray(image))
  if 0 in image.size:
    raise ValueError(f"image of {image.width}x{image.height} pixels: is empty")
  if image.getexif().get(ORIENTATION, 1) != 1:
    image = ImageOps.exif_transpose(image)
  image = opaque(eight_bit(image))
  mode = "RGB" if channels == 3 else "L"
  return image if image.mode == mode else image.convert(mode)


def from_array(array: np.ndarray) -> Image.Image:
  """A Pillow image of an array, see `to_pillow`."""
  shape, dtype = array.shape, array.dtype
  if dtype not in (np.uint8, np.uint16):
    raise ValueError(
      f"image of dtype {dtype}: must be uint8 (0 to 255) or uint16 (0 to"
      " 65535); scale other values to one of these ranges first"
    )
  if array.ndim != 2 and (array.ndim != 3 or shape[-1] not in (1, 3, 4)):
    first = array.ndim == 3 and shape[0] in (1, 3, 4)
    hint = "; channels are first, move them to the end" if first else ""
    raise ValueError(
      f"image of shape {shape}: must be [height, width] or [height, width, c]"
      f" with 1, 3 or 4 channels{hint}"
    )
  if array.ndim == 3 and shape[-1] == 1:
    array = array[..., 0]
  if dtype == np.uint16:
    array = halved(array)
  return Image.fromarray(np.ascontiguousarray(array))


def halved(array: np.ndarray) -> np.ndarray:
  """16-bit values in 8 bits: 65535 becomes 255."""
  return np.round(array / 257).astype(np.uint8)


def eight_bit(image: Image.Image) -> Image.Image:
  """An image of 8 bits a channel.

  Raises:
    ValueError: integers or floats whose range the mode does not state.
  """
  wide = image.mode.startswith("I;16")
  if wide or (image.mode == "I" and image.format in SIXTEEN_BIT):
    return Image.fromarray(halved(np.asarray(image)))
  if image.mode in ("I", "F"):
    raise ValueError(
      f"image of mode {image.mode!r}: 32-bit values whose range is not stated;"
      " convert it to 8 or 16 bits first"
    )
  return image


def opaque(image: Image.Image) -> Image.Image:
  """The image on white, if it has transparency; else itself."""
  if not image.has_transparency_data:
    return image
  image = image.convert("RGBA")
  white = Image.new("RGBA", image.size, "white")
  return Image.alpha_composite(white, image).convert("RGB")

