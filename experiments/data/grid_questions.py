"""Questions about a grid of digits: one cell, how many, the largest.

Some cells show a digit, the others one whose pixels are scrambled, in red. The
ground of three digits is green, blue or cyan; a question about one of these
needs the patches that show it and no others; how many there are and which
is the largest follow from what all cells show.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import digit_grid
from experiments.data.questions import (
  Conversations,
  Element,
  Question,
  conversation,
)
from experiments.data.words import Words
from tokjax.interop import Preprocessing

# The example number i of a split is drawn with (SPLITS[split], i).
SPLITS = {"train": 0, "test": 1}
TRAIN = 1 << 16
KINDS = ("cell", "count", "largest")
# Cells of one image that show the digit that is counted: 0 to MANY - 1.
MANY = 5
CELL = 8
# Green and blue of the ground of a cell that a question may name.
COLOURS = {"green": (16.0, 0.0), "blue": (0.0, 16.0), "cyan": (16.0, 16.0)}
# All that can be asked about an image: a kind, and the number of a colour.
QUESTIONS = (*(("cell", i) for i in range(3)), ("count", 0), ("largest", 0))
MOST, MEAN, STD = 16.0, 5.0, 20.0  # Pixels are 0 to MOST, and normalised.
LONGEST = 7  # Ids of a question with its answer and the end.


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
class GridQuestions(Conversations):
  """Images of digits of scikit-learn with questions; drawn anew at each turn.

  Held-out images show digits of the held-out split, one question each, and are
  the same in every run.

  Attributes:
    side: cells in a row and in a column.
    digits: cells that show a digit.
    turns: different questions about one image in training.
    heldout: held-out images, each with a question of the next kind in turn.
    asking: texts of training stop where the last answer begins, as held-out
      ones do: for recipes that look at the last token of a prompt.
  """

  side: int = 5
  digits: int = 8
  turns: int = 5
  heldout: int = 600
  asking: bool = False

  kinds = KINDS
  channels = 3
  longest = LONGEST

  def __post_init__(self):
    if not 1 <= self.side <= CELL:
      raise ValueError(f"side={self.side}: must lie in 1..{CELL}")
    if not MANY <= self.digits <= self.side**2:
      raise ValueError(
        f"digits={self.digits}: must lie in {MANY}..side**2={self.side**2}"
      )
    if not 1 <= self.turns <= len(QUESTIONS):
      raise ValueError(
        f"turns={self.turns}: must lie in 1..{len(QUESTIONS)}, the number of"
        " different questions"
      )
    if self.heldout < 1:
      raise ValueError(f"heldout={self.heldout}: must be 1 or more")

  @functools.cached_property
  def words(self) -> Words:
    """The language of questions and answers."""
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

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """Another image at every turn, with `turns` questions of all kinds."""
    scene = self.scene(element["split"], rng)
    # Each is asked once: an answer must not be copied from an earlier one.
    which = rng.permutation(len(QUESTIONS))[: self.turns]
    asked = [self.ask(scene, *QUESTIONS[i]) for i in which]
    return conversation(
      self.words, scene.image, asked, self.length, held=self.asking
    )

  def question(self, number: int) -> tuple[np.ndarray, Question]:
    """A held-out image and what is asked about it."""
    rng = np.random.default_rng((SPLITS["test"], number))
    scene = self.scene("test", rng)
    kind, colour = KINDS[number % len(KINDS)], int(rng.integers(len(COLOURS)))
    return scene.image, self.ask(scene, kind, colour)

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

  def ask(self, scene: Scene, kind: str, colour: int = 0) -> Question:
    """A question of a kind; `colour`: number of that of a cell."""
    label = scene.label
    if kind == "largest":
      return Question("which is the largest?", str(label.max()), kind)
    if kind == "count":
      count = (label == scene.common).sum()
      text = f"how many show {scene.common}?"
      return Question(text, str(count), kind)
    ((row, column),) = np.argwhere(scene.colour == colour).tolist()
    text = f"which digit is {tuple(COLOURS)[colour]}?"
    box = (row, column, row + 1, column + 1)
    box = tuple(edge / self.side for edge in box)
    return Question(text, str(label[row, column]), kind, box)
