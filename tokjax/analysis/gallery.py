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


def draw_methods(
  images: UInt8[np.ndarray, "b y x c"],
  maps: Mapping[str, Groups],
  path: pathlib.Path,
  *,
  title: str,
  side: int = 56,
  columns: int = 3,
) -> None:
  """A line of pictures for each method, the images themselves on top.

  Args:
    images: what the model saw, uint8.
    maps: groups of these images by name of method.
    path: the PNG written.
    title: one line above.
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
  texts = []

  def put(pictures, name, row, column):
    top, left = row * height + label, column * width
    texts.append((left, top - 5, name))
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
    put(pictures, f"{name}  {span}", i % rows + 1, i // rows)
  _write(canvas, texts, title, path)


def draw_blocks(
  image: UInt8[np.ndarray, "y x c"],
  blocks: Sequence[tuple[str, Groups]],
  path: pathlib.Path,
  *,
  title: str,
  note: str = "",
  columns: int | None = None,
  line: int = 1,
) -> None:
  """One image, then its merge map after each block.

  Args:
    image: what the model saw, uint8.
    blocks: a caption and the groups of a batch of one, for each picture.
    path: the PNG written.
    title, note: in the line above.
    columns: pictures next to each other; None: up to six in a row, more in
      several rows.
    line: width of outlines in pixels.
  """
  pictures = [("input", np.broadcast_to(image, (*image.shape[:2], 3)))]
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
  texts = []
  for i, (caption, picture) in enumerate(pictures):
    top = i // columns * (tall + label) + label
    left = i % columns * (wide + gap)
    canvas[top : top + tall, left : left + wide] = picture
    texts.append((left, top - 7, caption))
  _write(canvas, texts, f"{title}  {note}", path)


def enlarge(image: np.ndarray, least: int) -> np.ndarray:
  """Repeats pixels until the shorter side has at least `least` of them."""
  times = max(1, -(-least // min(image.shape[:2])))
  return image.repeat(times, axis=0).repeat(times, axis=1)


def _write(canvas, texts, title: str, path: pathlib.Path) -> None:
  """A canvas with captions, one pixel of it a pixel of the file.

  Args:
    texts: (x, y, text); what follows two spaces is printed in grey.
    title: the same, larger.
  """
  border, head = 16, 40
  height, width = canvas.shape[:2]
  whole = np.full(
    (height + head + border, width + 2 * border, 3), PAPER, np.uint8
  )
  whole[head : head + height, border : border + width] = canvas
  high, wide = whole.shape[:2]
  fig = drawing.figure(figsize=(wide / DPI, high / DPI), dpi=DPI)
  fig.figimage(whole)
  lines = [(border, 26, title, 11.0)]
  lines += [(x + border, y + head, text, 8.5) for x, y, text in texts]
  for x, y, text, size in lines:
    name, _, rest = text.partition("  ")
    bold = "bold" if size > 10 else "normal"
    first = fig.text(
      x / wide, 1 - y / high, name, size=size, color=INK, weight=bold
    )
    after = first.get_window_extent().x1 + size
    fig.text(after / wide, 1 - y / high, rest, size=size - 1, color=QUIET)
  fig.savefig(path)
