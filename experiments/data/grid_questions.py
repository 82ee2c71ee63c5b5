"""Questions about a grid of digits: one cell, how many, the largest.

Some cells show a digit, the others one whose pixels are scrambled, in red. A
green line says which row a cell is in, a blue one which column. A question
about a cell needs the patches that show it and no others; how many there are
and which is the largest follow from what all cells show.
"""

import dataclasses
import functools
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import digit_grid
from experiments.data.questions import Element, Question, conversation
from experiments.data.words import Words
from tokjax.interop import Preprocessing

# The example number i of a split is drawn with (SPLITS[split], i).
SPLITS = {"train": 0, "test": 1}
TRAIN = 1 << 16
KINDS = ("cell", "count", "largest")
# Of each kind among the questions of training.
SHARES = (0.6, 0.25, 0.15)
# Cells of one image that show the digit that is counted: 0 to MANY - 1.
MANY = 5
CELL = 8
MOST, MEAN, STD = 16.0, 5.0, 20.0  # Pixels are 0 to MOST, and normalised.
LONGEST = 8  # Ids of a question with its answer and the end.


class Scene(NamedTuple):
  """An image and what it shows.

  Attributes:
    image: `[8 side, 8 side, 3]`.
    label: the digit in each cell, `[side, side]`; -1: a scrambled one.
    common: a digit that may be counted.
  """

  image: np.ndarray
  label: np.ndarray
  common: int


@functools.cache
def by_label(split: str) -> list[np.ndarray]:
  """Which images of a split show each digit."""
  labels = digit_grid.flat(split)[1]
  return [np.flatnonzero(labels == digit) for digit in range(10)]


def marks(side: int) -> np.ndarray:
  """An empty grid with the marks of its cells, `[8 side, 8 side, 3]`."""
  image = np.zeros((CELL * side, CELL * side, 3), np.float32)
  for i in range(side):
    at = i * CELL + i * CELL // side
    image[at, :, 1] = image[:, at, 2] = MOST
  return image


def name(row: int, column: int) -> str:
  """Of a cell, as on a chess board: "b3" is the third of the second row."""
  return f"{string.ascii_lowercase[row]}{column + 1}"


@dataclasses.dataclass(frozen=True)
class GridQuestions:
  """Images of digits of scikit-learn with questions; drawn anew at each turn.

  Held-out images show digits of the held-out split, one question each, and are
  the same in every run.

  Attributes:
    side: cells in a row and in a column.
    digits: cells that show a digit.
    turns: questions about one image in training.
    heldout: held-out images, each with a question of the next kind in turn.
  """

  side: int = 5
  digits: int = 8
  turns: int = 4
  heldout: int = 600

  kinds = KINDS
  channels = 3

  def __post_init__(self):
    if not 1 <= self.side <= CELL:
      raise ValueError(f"side={self.side}: must lie in 1..{CELL}")
    if not MANY <= self.digits <= self.side**2:
      raise ValueError(
        f"digits={self.digits}: must lie in {MANY}..side**2={self.side**2}"
      )
    for name in ("turns", "heldout"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")

  @functools.cached_property
  def words(self) -> Words:
    """The language of questions and answers."""
    text = "which digit is at how many show the largest ?"
    cells = [name(i, j) for i in range(self.side) for j in range(self.side)]
    return Words((*map(str, range(10)), *cells, *text.split()))

  @property
  def num_classes(self) -> int:
    """Ids there are."""
    return len(self.words.vocabulary)

  @property
  def length(self) -> int:
    """Ids of the longest conversation, the image being one."""
    return 2 + LONGEST * self.turns

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

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """Another image at every turn, with `turns` questions of all kinds."""
    scene = self.scene(element["split"], rng)
    kinds = np.searchsorted(np.cumsum(SHARES), rng.random(self.turns))
    asked = [self.ask(scene, KINDS[kind], rng) for kind in kinds]
    return conversation(self.words, scene.image, asked, self.length)

  def prepare(self, element: Element) -> Element:
    """A held-out image with one question."""
    image, question = self.question(element["number"])
    return conversation(self.words, image, [question], self.length, held=True)

  def question(self, number: int) -> tuple[np.ndarray, Question]:
    """A held-out image and what is asked about it."""
    rng = np.random.default_rng((SPLITS["test"], number))
    scene = self.scene("test", rng)
    return scene.image, self.ask(scene, KINDS[number % len(KINDS)], rng)

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
    label = np.full(cells, -1)
    label[: self.digits] = wanted
    order = rng.permutation(cells)
    side, grid = self.side, shown[order].reshape(self.side, -1, CELL, CELL)
    image = marks(side)
    image[..., 0] = grid.swapaxes(1, 2).reshape(CELL * side, CELL * side)
    return Scene((image - MEAN) / STD, label[order].reshape(side, side), common)

  def ask(self, scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """Draws a question of a kind."""
    label = scene.label
    if kind == "largest":
      return Question("which is the largest?", str(label.max()), kind)
    if kind == "count":
      count = (label == scene.common).sum()
      text = f"how many show {scene.common}?"
      return Question(text, str(count), kind)
    places = np.argwhere(label >= 0)
    row, column = places[rng.integers(len(places))].tolist()
    text = f"which digit is at {name(row, column)}?"
    box = (row, column, row + 1, column + 1)
    box = tuple(edge / self.side for edge in box)
    return Question(text, str(label[row, column]), kind, box)
