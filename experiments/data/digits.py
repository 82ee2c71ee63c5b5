"""Scikit-learn's handwritten digits: 1797 images of 8x8, no download."""

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np

Element = dict[str, Any]


@functools.cache
def load() -> dict[str, tuple[Element, ...]]:
  """The examples of both splits; a fifth is held out, the same in every run."""
  # Not above: scikit-learn takes a second to import, and few commands need it.
  from sklearn import datasets, model_selection

  images, labels = datasets.load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype(np.float32)
  parts = model_selection.train_test_split(
    images, labels.astype(np.int32), test_size=0.2, stratify=labels,
    random_state=0,
  )  # fmt: skip
  train, test, train_label, test_label = parts

  def examples(images, labels):
    pairs = zip(images, labels, strict=True)
    return tuple({"image": i, "label": k} for i, k in pairs)

  return {
    "train": examples(train, train_label),
    "test": examples(test, test_label),
  }


@dataclasses.dataclass(frozen=True)
class Digits:
  """Images `[side, side, 1]` in about (-1, 2), labels 0 to 9.

  Attributes:
    shift: largest shift of a training image in pixels; zeros come in.
    canvas: side of the image, in which the digit has a random place; most of
      a larger one than 8 says nothing.
    stride: the place is a multiple of so many pixels.
    clutter: pieces of 4 x 4 pixels of other digits that lie around and on the
      digit. A held-out image has the same place and pieces in every run.
  """

  shift: int = 1
  canvas: int = 8
  stride: int = 1
  clutter: int = 0

  num_classes = 10

  def __post_init__(self):
    if self.canvas < 8:
      raise ValueError(f"canvas={self.canvas}: must be 8 or more")
    if self.stride < 1:
      raise ValueError(f"stride={self.stride}: must be 1 or more")
    if self.clutter < 0:
      raise ValueError(f"clutter={self.clutter}: must be 0 or more")

  def source(self, split: str) -> tuple[Element, ...]:
    """Raw examples by index; `split` is "train" or "test"."""
    return load()[split]

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """A training example: shifted, then prepared."""
    s = self.shift
    # np.pad takes longer than all the rest.
    image = np.zeros((8 + 2 * s, 8 + 2 * s, 1), np.float32)
    image[s : s + 8, s : s + 8] = element["image"]
    top, left = rng.integers(0, 2 * s + 1, size=2)
    image = image[top : top + 8, left : left + 8]
    return self._finish({**element, "image": image}, rng)

  def prepare(self, element: Element) -> Element:
    """A held-out example as the model sees it."""
    seed = zlib.crc32(element["image"].tobytes())
    return self._finish(element, np.random.default_rng(seed))

  def _finish(self, element: Element, rng: np.random.Generator) -> Element:
    image = element["image"]
    if self.canvas > 8 or self.clutter:
      image = self._on_canvas(image, rng)
    return {**element, "image": (image - 5.0) / 6.0}

  def _on_canvas(self, digit: np.ndarray, rng: np.random.Generator):
    places = (self.canvas - 8) // self.stride + 1
    top, left = self.stride * rng.integers(0, places, size=2)
    image = np.zeros((self.canvas, self.canvas, 1), np.float32)
    image[top : top + 8, left : left + 8] = digit
    others = load()["train"]
    for _ in range(self.clutter):
      other = others[rng.integers(len(others))]["image"]
      i, j = rng.integers(0, 5, size=2)
      row, column = rng.integers(0, self.canvas - 3, size=2)
      place = image[row : row + 4, column : column + 4]
      np.maximum(place, other[i : i + 4, j : j + 4], out=place)
    return image
