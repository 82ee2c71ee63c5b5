"""Figures of merge maps: many methods on many images, or block by block."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from tokjax.analysis import drawing
from tokjax.analysis.merge_map import Groups, paint

INK, QUIET, PAPER = "#202020", "#707070", 255
DPI = 100
# Sizes in points of titles, captions, and what is in grey next to them.
TITLE, CAPTION, SMALLER = 11.0, 8.5, 1.0
BORDER, LINE = 16, 26


Text = tuple[int, int, str, float]


def draw_methods(
  images: UInt8[np.ndarray, "b y x c"],
  maps: Mapping[str, Groups],
  path: pathlib.Path,
  *,
  title: str,
  note: str = "",
  side: int = 56,
  columns: int = 3,
) -> None:
  """A line of pictures for each method, the images themselves on top.

  Args:
    images: what the model saw, uint8.
    maps: groups of these images by name of method.
    path: the PNG written.
    title, note: in the line above.
    side: smallest side of a picture in pixels.
    columns: methods next to each other.
  """
  images = np.stack([enlarge(image, side) for image in images])
  count, tall, wide, _ = images.shape
  gap = max(3, wide // 16)
  columns = max(min(columns, len(maps)), 1)
  rows = math.ceil(len(maps) / columns)
  strip, label = count * (wide + gap), 20
  height, width = tall + label, strip + 6 * gap
  canvas = np.full((height * (rows + 1), width * columns, 3), PAPER, np.uint8)
  texts: list[Text] = []

  def put(pictures, name, row, column):
    top, left = row * height + label, column * width
    texts.append((left, top - 5, name, CAPTION))
    for i, picture in enumerate(pictures):
      x = left + i * (wide + gap)
      canvas[top : top + tall, x : x + wide] = picture

  for column in range(columns):
    put(images, "input" if column == 0 else "", 0, column)
  for i, (name, groups) in enumerate(maps.items()):
    pictures = [
      paint(*args)
      for args in zip(images, groups.index, groups.share, strict=True)
    ]
    tokens = np.unique(groups.num_tokens)
    span = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]}–{tokens[-1]}"
    put(pictures, f"{name}  {span} tokens", i % rows + 1, i // rows)
  _write(canvas, texts, [f"{title}  {note}"], images[0], path)


def draw_blocks(
  image: UInt8[np.ndarray, "y x c"],
  blocks: Sequence[tuple[str, Groups]],
  path: pathlib.Path,
  *,
  title: str,
  note: str = "",
  below: str = "",
  columns: int | None = None,
  line: int = 1,
) -> None:
  """One image, then its merge map after each block.

  Args:
    image: what the model saw, uint8.
    blocks: a caption and the groups of a batch of one, for each picture.
    path: the PNG written.
    title, note: in the line above.
    below: a second line, in grey.
    columns: pictures next to each other; None: up to six in a row, more in
      several rows.
    line: width of outlines in pixels.
  """
  image = np.broadcast_to(image, (*image.shape[:2], 3))
  pictures = [("input", image)]
  for caption, groups in blocks:
    (index,), (share,) = groups.index, groups.share
    painted = paint(image, index, share, line=line)
    pictures.append((caption, painted))
  tall, wide = image.shape[:2]
  if columns is None and len(pictures) > 6:
    columns = math.ceil(math.sqrt(len(pictures) * tall / wide * 1.5))
  columns = min(columns or len(pictures), len(pictures))
  rows = math.ceil(len(pictures) / columns)
  gap, label = 12, 26
  canvas = np.full(
    (rows * (tall + label), columns * (wide + gap) - gap, 3), PAPER, np.uint8
  )
  texts: list[Text] = []
  for i, (caption, picture) in enumerate(pictures):
    top = i // columns * (tall + label) + label
    left = i % columns * (wide + gap)
    canvas[top : top + tall, left : left + wide] = picture
    texts.append((left, top - 7, caption, CAPTION))
  heads = [f"{title}  {note}"] + ([f"  {below}"] if below else [])
  _write(canvas, texts, heads, image, path)


def enlarge(image: np.ndarray, least: int) -> np.ndarray:
  """Repeats pixels until the shorter side has at least `least` of them."""
  times = max(1, -(-least // min(image.shape[:2])))
  return image.repeat(times, axis=0).repeat(times, axis=1)


def _key(image: np.ndarray, side: int = 18) -> list[tuple[np.ndarray, str]]:
  """What the pictures mean, painted as they are, from a piece of the image."""
  middle = [max(0, (size - 2 * side) // 2) for size in image.shape[:2]]
  piece = image[middle[0] :, middle[1] :][:side, : 2 * side]
  piece = np.broadcast_to(piece, (*piece.shape[:2], 3))
  piece = piece[:, : piece.shape[1] // 4 * 4]
  own, gone = np.arange(4), np.full(4, -1)
  pairs = own // 2
  share = lambda index: (np.arange(4)[:, None] == index) * 1.0
  return [
    (paint(piece, index[None], share(index)), meaning)
    for index, meaning in (
      (own, "a token of its own"),
      (pairs, "patches in one token: their mean colour, outlined"),
      (gone, "dropped"),
    )
  ]


def _write(
  canvas: np.ndarray,
  texts: Sequence[Text],
  heads: Sequence[str],
  image: np.ndarray,
  path: pathlib.Path,
) -> None:
  """A canvas with captions, one pixel of it a pixel of the file.

  Args:
    texts: x, y, text and size; what follows two spaces is printed in grey.
    heads: lines above it, likewise, larger.
    image: for the key, which stands below.
    path: the PNG written.
  """
  lines: list[Text] = [
    (BORDER, LINE * (i + 1), text, TITLE - i) for i, text in enumerate(heads)
  ]
  top = LINE * len(heads) + 14
  lines += [(x + BORDER, y + top, text, size) for x, y, text, size in texts]
  y, x, key = top + canvas.shape[0] + BORDER, BORDER, []
  measure = _Page(1000, 1000)
  for picture, meaning in _key(image):
    key.append((x, y, picture))
    x += picture.shape[1] + 8
    lines.append((x, y + picture.shape[0] - 5, meaning, CAPTION))
    x = round(measure.write(lines[-1])) + 28
  ends = [measure.write(line) for line in lines]
  width = max(canvas.shape[1], round(max(ends)) - BORDER) + 2 * BORDER
  height = y + max(len(picture) for _, _, picture in key) + BORDER
  whole = np.full((height, width, 3), PAPER, np.uint8)
  for left, above, picture in [(BORDER, top, canvas), *key]:
    tall, wide, _ = picture.shape
    whole[above : above + tall, left : left + wide] = picture
  page = _Page(height, width)
  page.figure.figimage(whole)
  for line in lines:
    page.write(line)
  page.figure.savefig(path)


class _Page:
  """A figure of which a pixel is a pixel of the file."""

  def __init__(self, height: int, width: int):
    self.height, self.width = height, width
    self.figure = drawing.figure(figsize=(width / DPI, height / DPI), dpi=DPI)

  def write(self, line: Text) -> float:
    """Writes a line of text; returns the pixel at which it ends."""
    x, y, text, size = line
    name, _, rest = text.partition("  ")
    first = dict(size=size, color=INK, weight="bold" if size > 10 else "normal")
    then = dict(size=size - SMALLER, color=QUIET)
    end = float(x)
    for part, style in ((name, first), (rest, then)):
      if part:
        at = end / self.width, 1 - y / self.height
        put = self.figure.text(*at, part, **style)
        end = put.get_window_extent().x1 + size
    return end
