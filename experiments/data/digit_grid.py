"""The largest of a few digits, somewhere in a grid of scrambled ones.

One cell of 8 x 8 pixels is one token of a model with such patches. What a cell
shows takes more than a linear map to see, so that no attention of the first
block can read the answer: it matters which tokens are left behind it.
"""

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np

from experiments.data import digits

Element = dict[str, Any]


@functools.cache
def flat(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Pixels `[n, 64]` and labels `[n]` of a split."""
  examples = digits.load()[split]
  images = np.stack([e["image"].reshape(64) for e in examples])
  return images, np.stack([e["label"] for e in examples])


@dataclasses.dataclass(frozen=True)
class DigitGrid:
  """Images `[8 side, 8 side, 1]` in about (-1, 2); the label is the largest.

  Every example of scikit-learn's digits gets companions of its own split, at
  random cells; all other cells show digits whose pixels are permuted. A
  held-out image is the same in every run.

  Attributes:
    side: cells in a row and in a column.
    digits: cells that show a digit.
    copies: held-out images for each held-out digit.
  """

  side: int = 6
  digits: int = 3
  copies: int = 1

  num_classes = 10

  def __post_init__(self):
    if not 1 <= self.digits <= self.side**2:
      raise ValueError(
        f"digits={self.digits}: must be in 1..side**2={self.side**2}"
      )
    if self.copies < 1:
      raise ValueError(f"copies={self.copies}: must be 1 or more")

  def source(self, split: str) -> tuple[Element, ...]:
    """Raw examples by index; `split` is "train" or "test"."""
    examples = digits.load()[split]
    copies = self.copies if split == "test" else 1
    return tuple(
      {**e, "split": split, "copy": i} for i in range(copies) for e in examples
    )

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """A training example: other companions and places in every epoch."""
    images, labels = flat(element["split"])
    chosen = rng.integers(len(images), size=self.side**2)
    cells = rng.permuted(images[chosen], axis=1)
    shown = chosen[: self.digits]
    cells[: self.digits] = images[shown]
    cells[0] = element["image"].reshape(64)
    label = max(element["label"], *labels[shown[1:]], 0)
    grid = rng.permutation(cells).reshape(self.side, self.side, 8, 8)
    image = grid.swapaxes(1, 2).reshape(8 * self.side, 8 * self.side, 1)
    return {"image": (image - 5.0) / 6.0, "label": np.int32(label)}

  def prepare(self, element: Element) -> Element:
    """A held-out example as the model sees it."""
    seed = zlib.crc32(element["image"].tobytes()), element["copy"]
    return self.augment(element, np.random.default_rng(seed))
