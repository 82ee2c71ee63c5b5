"""Questions about images, as examples of the training loop.

A conversation is `<s> <image> question answer </s> question answer </s> ...`;
an example is its ids, and what is expected at each of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data.words import END, IMAGE, START, InWords, Words

Element = dict[str, Any]
# Instead of an expected id: nothing is asked.
NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about an image.

  Attributes:
    text: in words of the data set, with a question mark at the end.
    answer: one word.
    kind: what sort of question it is.
    box: the part of the image that it names: top, left, bottom and right side
      as fractions of the image; None: it names none.
  """

  text: str
  answer: str
  kind: str
  box: tuple[float, float, float, float] | None = None

  @property
  def prompt(self) -> str:
    """The question with the placeholder of its image."""
    return f"<image> {self.text}"

  def named(self, grid: tuple[int, int]) -> np.ndarray:
    """Which patches of a grid have their centre in the box, `[patches]`."""
    if self.box is None:
      return np.zeros(grid[0] * grid[1], bool)
    top, left, bottom, right = self.box
    row, column = ((np.arange(n) + 0.5) / n for n in grid)
    rows = (row > top) & (row < bottom)
    return np.outer(rows, (column > left) & (column < right)).ravel()


class Conversations(InWords):
  """What data sets of conversations about images have in common.

  Attributes:
    turns: questions about one image in training.
    longest: ids of a question with its answer and the end.
  """

  turns: int
  longest: int

  @property
  def length(self) -> int:
    """Ids of the longest conversation, the image being one."""
    return 2 + self.longest * self.turns

  def question(self, number: int) -> tuple[np.ndarray, Question]:
    """A held-out image and what is asked about it."""
    raise NotImplementedError

  def prepare(self, element: Element) -> Element:
    """A held-out image with one question."""
    image, question = self.question(element["number"])
    return conversation(self.words, image, [question], self.length, held=True)


def conversation(
  words: Words,
  image: np.ndarray,
  questions: Sequence[Question],
  length: int,
  *,
  held: bool = False,
) -> Element:
  """An example of the training loop.

  Args:
    words: of the data set.
    image: as the model sees it.
    questions: asked one after the other.
    length: that ids are padded to.
    held: of held-out examples, the ends of answers are not expected, and the
      text stops where the last answer would begin: no recipe sees it.

  Returns:
    "image" `[height, width, c]`, "tokens" and "target" `[length]`, int32, with
    `NOTHING` where nothing is asked, and "length", the number of ids.
  """
  ids, expected = [START, IMAGE], [NOTHING] * 2
  for question in questions:
    asked = words.encode(question.text)[1:]
    (answer,) = words.encode(question.answer)[1:]
    ids += [*asked, answer, END]
    expected += [NOTHING] * (len(asked) - 1)
    expected += [answer, NOTHING if held else END, NOTHING]
  if held:
    ids, expected = ids[:-2], expected[:-2]
  if len(ids) > length:
    raise ValueError(f"length={length}: the conversation has {len(ids)} ids")
  tokens, target = np.zeros(length, np.int32), np.full(length, NOTHING)
  tokens[: len(ids)], target[: len(ids)] = ids, expected
  return {
    "image": image.astype(np.float32),
    "tokens": tokens,
    "target": target.astype(np.int32),
    "length": np.int32(len(ids)),
  }
