"""Images of any size as crops: which ones, and how their tokens are laid out.

LLaVA-NeXT: an image is seen once as a whole and once in crops of the encoder's
size. The tokens of the crops stand as one grid, without those of the padding,
and every row of it ends in a newline.
"""

from typing import NamedTuple

import numpy as np

# In a layout: the newline.
NEWLINE = -1
Size = tuple[int, int]


class Crops(NamedTuple):
  """An image as a model of any resolution takes it.

  Attributes:
    pixels: the whole image, then its crops row by row, `[p, h, w, c]`.
    size: height and width of the image, in pixels.
  """

  pixels: np.ndarray
  size: Size


def best_size(size: Size, pinpoints: tuple[Size, ...]) -> Size:
  """The pinpoint that shows most of an image and wastes least, the first such.

  Args:
    size: height and width of the image.
    pinpoints: heights and widths that an image may be brought to.
  """

  def merit(point: Size) -> tuple[int, int]:
    height, width = point
    scale = min(width / size[1], height / size[0])
    shown = int(size[1] * scale) * int(size[0] * scale)
    shown = min(shown, size[0] * size[1])
    return shown, shown - width * height

  return max(pinpoints, key=merit)


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
  """Rows and columns of a grid of tokens that show the image, not padding."""
  (height, width), (rows, columns) = size, grid
  if width / height > columns / rows:
    over = (rows - int(round(height * (columns / width), 7))) // 2
    return slice(over, rows - over), slice(0, columns)
  over = (columns - int(round(width * (rows / height), 7))) // 2
  return slice(0, rows), slice(over, columns - over)


def layout(
  size: Size, pinpoints: tuple[Size, ...], side: int, grid: Size
) -> np.ndarray:
  """Where each token of an image comes from, `[m]`.

  Args:
    size: height and width of the image.
    pinpoints: see `best_size`.
    side: of a crop, in pixels.
    grid: rows and columns of tokens of a crop.

  Returns:
    Rows among the tokens of all its crops one after the other, or `NEWLINE`.
  """
  rows, columns = grid
  high, wide = (n // side for n in best_size(size, pinpoints))
  whole = np.arange(rows * columns)
  # The crops behind the whole image, put together to one grid.
  inside = (1 + np.arange(high * wide)[:, None]) * rows * columns + whole
  inside = inside.reshape(high, wide, rows, columns).transpose(0, 2, 1, 3)
  inside = inside.reshape(high * rows, wide * columns)
  inside = inside[unpadded(size, inside.shape)]
  ends = np.full((len(inside), 1), NEWLINE)
  lines = np.concatenate([inside, ends], axis=1)
  return np.concatenate([whole, lines.reshape(-1)])
