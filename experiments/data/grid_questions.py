"""Questions about a grid of digits: one cell, how many, the largest.

A question about a cell with a coloured ground needs the patches that show it
and no others; how many there are and which is the largest follow from what all
cells show.
"""

import dataclasses

import numpy as np

from experiments.data.grid_scenes import COLOURS, GridScenes, Scene
from experiments.data.questions import (
  Conversations,
  Element,
  Question,
  conversation,
)

KINDS = ("cell", "count", "largest")
# All that can be asked about an image: a kind, and the number of a colour.
QUESTIONS = (*(("cell", i) for i in range(3)), ("count", 0), ("largest", 0))
LONGEST = 7  # Ids of a question with its answer and the end.


@dataclasses.dataclass(frozen=True)
class GridQuestions(GridScenes, Conversations):
  """Images of digits with questions; drawn anew at each turn.

  Each held-out image has one question, of the next kind in turn.

  Attributes:
    turns: different questions about one image in training.
    asking: texts of training stop where the last answer begins, as held-out
      ones do: for recipes that look at the last token of a prompt.
  """

  turns: int = 5
  asking: bool = False

  kinds = KINDS
  longest = LONGEST

  def __post_init__(self):
    super().__post_init__()
    if not 1 <= self.turns <= len(QUESTIONS):
      raise ValueError(
        f"turns={self.turns}: must lie in 1..{len(QUESTIONS)}, the number of"
        " different questions"
      )

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
    rng = self.heldout_rng(number)
    scene = self.scene("test", rng)
    kind, colour = KINDS[number % len(KINDS)], int(rng.integers(len(COLOURS)))
    return scene.image, self.ask(scene, kind, colour)

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
