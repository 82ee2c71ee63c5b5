"""Grids of digits, drawn anew: what questions and captions are about.

Some cells show a digit, the others one whose pixels are scrambled, in red. The
ground of three digits is green, blue or cyan.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import digit_grid
from experiments.data.digit_grid import Element
from experiments.data.words import InWords, Words
from tokjax.interop import Preprocessing

# The example number i of a split is drawn with (SPLITS[split], i).
SPLITS = {"train": 0, "test": 1}
TRAIN = 1 << 16
# Cells of one image that show the digit that is counted: 0 to MANY - 1.
MANY = 5
CELL = 8
# Green and blue of the ground of a cell that a question may name.
COLOURS = {"green": (16.0, 0.0), "blue": (0.0, 16.0), "cyan": (16.0, 16.0)}
MOST, MEAN, STD = 16.0, 5.0, 20.0  # Pixels are 0 to MOST, and normalised.


class Scene(NamedTuple):
  """An image and what it shows.

  Attributes:
    image: `[8 side, 8 side, 3]`.
    label: the digit in each cell, `[side, side]`; -1: a scrambled one.
    common: a digit that may be counted.
    colour: of the ground of each cell, by its number; -1: it is black.
  """

  image: np.ndarray
  label: np.ndarray
  common: int
  colour: np.ndarray


@functools.cache
def by_label(split: str) -> list[np.ndarray]:
  """Which images of a split show each digit."""
  labels = digit_grid.flat(split)[1]
  return [np.flatnonzero(labels == digit) for digit in range(10)]


@dataclasses.dataclass(frozen=True)
class GridScenes(InWords):
  """Images of digits of scikit-learn; a data set says what is told of them.

  Held-out images show digits of the held-out split, and are the same in every
  run.

  Attributes:
    side: cells in a row and in a column.
    digits: cells that show a digit.
    heldout: held-out images.
  """

  side: int = 5
  digits: int = 8
  heldout: int = 600

  channels = 3

  def __post_init__(self):
    if not 1 <= self.side <= CELL:
      raise ValueError(f"side={self.side}: must lie in 1..{CELL}")
    if not MANY <= self.digits <= self.side**2:
      raise ValueError(
        f"digits={self.digits}: must lie in {MANY}..side**2={self.side**2}"
      )
    if self.heldout < 1:
      raise ValueError(f"heldout={self.heldout}: must be 1 or more")

  @functools.cached_property
  def words(self) -> Words:
    """The language of questions, answers and captions."""
    text = "which digit is how many show the largest ?"
    return Words((*map(str, range(10)), *COLOURS, *text.split()))

  @property
  def image_size(self) -> int:
    """Height and width of an image in pixels."""
    return CELL * self.side

  @property
  def preprocessing(self) -> Preprocessing:
    """From an image file to what the model sees."""
    return Preprocessing(
      (MEAN / MOST,) * 3, (STD / MOST,) * 3, self.image_size
    )

  def source(self, split: str) -> Sequence[Element]:
    """Seeds; an example is drawn when it is asked for."""
    count = self.heldout if split == "test" else TRAIN
    return [{"split": split, "number": i} for i in range(count)]

  def heldout_rng(self, number: int) -> np.random.Generator:
    """Draws a held-out image, and then what is asked about it."""
    return np.random.default_rng((SPLITS["test"], number))

  def scene(self, split: str, rng: np.random.Generator) -> Scene:
    """Draws an image of digits of a split.

    The largest digit is drawn first, and how many cells show one of the others,
    so that guesses are of little use.
    """
    pixels, of = digit_grid.flat(split)[0], by_label(split)
    top, many = rng.integers(3, 10), rng.integers(MANY)
    common = rng.integers(top + 1)
    # One of the other digits up to the largest.
    wanted = rng.integers(top, size=self.digits)
    wanted += wanted >= common
    wanted[:many] = common
    chance, cells = rng.random(self.digits), self.side**2
    shown = pixels[rng.integers(len(pixels), size=cells)]
    shown[self.digits :] = rng.permuted(shown[self.digits :], axis=1)
    for i, digit in enumerate(wanted):
      shown[i] = pixels[of[digit][int(chance[i] * len(of[digit]))]]
    label, colour = np.full((2, cells), -1)
    label[: self.digits] = wanted
    colour[self.digits - len(COLOURS) : self.digits] = range(len(COLOURS))
    ground = np.array([*COLOURS.values(), (0.0, 0.0)])[colour]
    patch = np.zeros((cells, CELL * CELL, 3), np.float32)
    patch[..., 0], patch[..., 1:] = shown, ground[:, None]
    order, side = rng.permutation(cells), self.side
    image = patch[order].reshape(side, side, CELL, CELL, 3).swapaxes(1, 2)
    image = image.reshape(CELL * side, CELL * side, 3)
    label, colour = (x[order].reshape(side, side) for x in (label, colour))
    return Scene((image - MEAN) / STD, label, common, colour)
