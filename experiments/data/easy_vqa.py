"""easy-VQA: 5000 pictures of one shape, 48,000 questions about it.

Of the package `easy-vqa` (Victor Zhou, MIT licence), which carries the
pictures: `pip install "tokjax[easyvqa]"`. Nothing else is downloaded. A picture
shows one of three shapes in one of eight colours; questions ask for the shape,
for the colour, or whether there is a certain one.
"""

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.data.errors import DataError
from experiments.data.questions import (
  Conversations,
  Element,
  Question,
  conversation,
)
from experiments.data.words import PART, Words
from tokjax.interop import Preprocessing

KINDS = ("whether", "shape", "colour")
SHAPES = ("circle", "rectangle", "triangle")
SIDE, LONGEST = 64, 12  # Pixels; ids of a question with its answer and the end.
# Pictures are bright; they are centred about 0.
MEAN, STD = (0.9,) * 3, (0.25,) * 3


class Split(NamedTuple):
  """Part of the pictures.

  Attributes:
    paths: of pictures, by number.
    asked: questions about each, by number.
  """

  paths: dict[int, str]
  asked: dict[int, tuple[Question, ...]]


def kind_of(answer: str) -> str:
  """What a question with this answer asks for."""
  if answer in ("yes", "no"):
    return "whether"
  return "shape" if answer in SHAPES else "colour"


@functools.cache
def package() -> Any:
  """The package.

  Raises:
    DataError: it is not installed.
  """
  try:
    return importlib.import_module("easy_vqa")
  except ImportError as error:
    raise DataError(
      "data.name=easy_vqa: the package easy-vqa is not installed; pip install"
      ' "tokjax[easyvqa]"'
    ) from error


@functools.cache
def load(split: str) -> Split:
  """Pictures and questions of "train" or "test"."""
  own = package()
  asked: dict[int, list[Question]] = {}
  rows = getattr(own, f"get_{split}_questions")()
  for text, answer, number in zip(*rows, strict=True):
    question = Question(text, answer, kind_of(answer))
    asked.setdefault(number, []).append(question)
  paths = getattr(own, f"get_{split}_image_paths")()
  return Split(paths, {i: tuple(asked[i]) for i in sorted(asked)})


def picture(path: str) -> np.ndarray:
  """Normalised, `[64, 64, 3]`."""
  with Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
  return ((pixels - MEAN) / STD).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class EasyVqa(Conversations):
  """Questions about pictures of one shape.

  Attributes:
    turns: questions about one picture in training, drawn anew at each turn.
    heldout: held-out questions, one a picture, evenly spread over all of them.
    asking: as in `GridQuestions`.
  """

  turns: int = 4
  heldout: int = 900
  asking: bool = False

  kinds = KINDS
  channels = 3
  longest = LONGEST
  image_size = SIDE

  def __post_init__(self):
    for name in ("turns", "heldout"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")

  @functools.cached_property
  def words(self) -> Words:
    """The language of questions and answers."""
    found: dict[str, None] = {}
    for split in ("train", "test"):
      for asked in load(split).asked.values():
        for one in asked:
          found |= dict.fromkeys((*PART.findall(one.text.lower()), one.answer))
    return Words(tuple(sorted(found)))

  @property
  def preprocessing(self) -> Preprocessing:
    """From an image file to what the model sees."""
    return Preprocessing(MEAN, STD, SIDE)

  def source(self, split: str) -> Sequence[Element]:
    """Numbers of pictures, or of held-out questions."""
    if split == "test":
      return [{"number": i} for i in range(self.heldout)]
    return [{"number": i} for i in load("train").asked]

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """A picture of training with some of its questions."""
    own = load("train")
    asked = own.asked[element["number"]]
    chosen = rng.permutation(len(asked))[: self.turns]
    return conversation(
      self.words, picture(own.paths[element["number"]]),
      [asked[i] for i in chosen], self.length, held=self.asking,
    )  # fmt: skip

  def question(self, number: int) -> tuple[np.ndarray, Question]:
    """A held-out picture and what is asked about it."""
    own = load("test")
    every = [(i, one) for i, asked in own.asked.items() for one in asked]
    index, question = every[number * len(every) // self.heldout]
    return picture(own.paths[index]), question
