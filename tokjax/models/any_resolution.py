"""Images of any size as crops: which ones, and how their tokens are laid out.

LLaVA-NeXT: an image is seen once as a whole and once in crops of the encoder's
size. The tokens of the crops stand as one grid, without those of the padding,
and every row of it ends in a newline. LLaVA-OneVision also brings a large grid
down to fewer tokens, each of which is a mean of four; frames of a video have
half of a grid's sides, and one newline ends them all.
"""

import math
from typing import NamedTuple

import numpy as np

# In a layout: the newline.
NEWLINE = -1
Size = tuple[int, int]
# A grid is brought down if its sides are longer than they may be by more.
TOLERANCE = 1.1


class Crops(NamedTuple):
  """An image as a model of any resolution takes it.

  Attributes:
    pixels: the whole image, then its crops row by row, `[p, h, w, c]`.
    size: height and width of the image, in pixels.
    frames: they are frames of a video instead.
  """

  pixels: np.ndarray
  size: Size
  frames: bool = False


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
  inside = crops_as_grid(size, pinpoints, side, grid)
  ends = np.full((len(inside), 1), NEWLINE)
  lines = np.concatenate([inside, ends], axis=1)
  return np.concatenate([np.arange(grid[0] * grid[1]), lines.reshape(-1)])


def crops_as_grid(
  size: Size, pinpoints: tuple[Size, ...], side: int, grid: Size
) -> np.ndarray:
  """The tokens of the crops of an image as one grid, without the padding.

  Arguments and entries as those of `layout`.
  """
  rows, columns = grid
  high, wide = (n // side for n in best_size(size, pinpoints))
  whole = np.arange(rows * columns)
  # The crops stand behind the whole image.
  inside = (1 + np.arange(high * wide)[:, None]) * rows * columns + whole
  inside = inside.reshape(high, wide, rows, columns).transpose(0, 2, 1, 3)
  inside = inside.reshape(high * rows, wide * columns)
  return inside[unpadded(size, inside.shape)]


def mixed_layout(
  size: Size, pinpoints: tuple[Size, ...], side: int, grid: Size, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """`layout`, in which each token is a weighted mean of four, `[m, 4]` twice.

  Args:
    size, pinpoints, side, grid: as for `layout`.
    most: the crops may have as many tokens as this number of crops; a larger
      grid is brought down by bilinear interpolation.

  Returns:
    Rows as in `layout`, and their weights, which sum to one.
  """
  inside = crops_as_grid(size, pinpoints, side, grid)
  taken, weight = resized(
    inside, brought_down(inside.shape, most * grid[0] ** 2)
  )
  one = np.array([1.0, 0, 0, 0], np.float32)
  ends = np.full((len(taken), 1, 4), NEWLINE)
  rows = np.concatenate([taken, ends], axis=1)
  weights = np.concatenate([weight, np.broadcast_to(one, ends.shape)], axis=1)
  whole = np.repeat(np.arange(grid[0] * grid[1])[:, None], 4, axis=1)
  return (
    np.concatenate([whole, rows.reshape(-1, 4)]),
    np.concatenate([np.tile(one, (len(whole), 1)), weights.reshape(-1, 4)]),
  )


def video_layout(frames: int, grid: Size) -> tuple[np.ndarray, np.ndarray]:
  """Where each token of a video comes from, and weights, as `mixed_layout`.

  Args:
    frames: how many there are.
    grid: rows and columns of tokens of a frame. It is brought to half of each,
      rounded up, by bilinear interpolation.
  """
  count = grid[0] * grid[1]
  half = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
  taken, weight = (
    x.reshape(-1, 4) for x in resized(np.arange(count).reshape(grid), half)
  )
  rows = np.concatenate([taken + i * count for i in range(frames)])
  end = np.array([[1.0, 0, 0, 0]], np.float32)
  return (
    np.concatenate([rows, np.full((1, 4), NEWLINE)]),
    np.concatenate([np.tile(weight, (frames, 1)), end]),
  )


def resized(inside: np.ndarray, new: Size) -> tuple[np.ndarray, np.ndarray]:
  """Entries and weights of a grid of tokens in another size, `[*new, 4]`."""
  (row, of_row), (column, of_column) = map(linear_taps, inside.shape, new)
  taken = inside[row[:, None, :, None], column[None, :, None, :]]
  weight = of_row[:, None, :, None] * of_column[None, :, None, :]
  return taken.reshape(*new, 4), weight.reshape(*new, 4)


def brought_down(grid: Size, tokens: int) -> Size:
  """Sides of a grid of about so many tokens, if it has clearly more."""
  ratio = math.sqrt(grid[0] * grid[1] / tokens)
  if ratio <= TOLERANCE:
    return grid
  return int(grid[0] // ratio), int(grid[1] // ratio)


def linear_taps(size: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Two sources and weights of each entry, `[new, 2]`.

  Of torch's bilinear resize along one axis: centres are mapped, what lies
  beyond the edge reads the edge.
  """
  scale = np.float32(size / new)
  at = (np.arange(new, dtype=np.float32) + 0.5) * scale - np.float32(0.5)
  at = np.maximum(at, 0)
  first = np.minimum(at.astype(int), size - 1)
  source = np.stack([first, np.minimum(first + 1, size - 1)], axis=-1)
  second = (at - first).astype(np.float32)
  return source, np.stack([1 - second, second], axis=-1)
