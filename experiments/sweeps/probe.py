"""One question about a long context, and which questions a sweep asks.

A probe is a prompt, tokens that are then fed one by one, and what is expected
at each. The prompt ends before the question does, so that a cache has to answer
from what it kept.
"""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

# Instead of an id that is fed: what the model itself answered last.
OWN = -1
# Instead of an expected id: nothing is asked.
NOTHING = -1
Judge = Literal["contains", "f1"]
Task = Literal["single", "keys", "values", "tracking"]
TASKS: tuple[Task, ...] = ("single", "keys", "values", "tracking")


class Probe(NamedTuple):
  """One question, or several about one context.

  Attributes:
    prompt: ids.
    asked, answer: ids fed after the prompt (`OWN`: the model's last answer),
      and those expected at each (`NOTHING`: none).
    length, depth, pairs: of the context in tokens, of the needle between 0
      and 1 (-1: anywhere), and how many could be asked for.
    whole: the answers are tokens of one, which is right if all of them are;
      False: each is an answer of its own.
    task: what kind of question it is.
    turn: number of the answer that each expected id belongs to, for several
      answers of several ids; empty: as `whole` says.
    wanted: texts that the generated one must contain, in any order; empty:
      `answer` says what is right.
    judge: how a generated text is compared with `wanted`. "contains": the share
      of them that it contains; "f1": the best F1 of its words with one of them.
    alternatives: one of `wanted` is enough.
  """

  prompt: Sequence[int]
  asked: Sequence[int]
  answer: Sequence[int]
  length: int
  depth: float
  pairs: int
  whole: bool = False
  task: str = "single"
  turn: Sequence[int] = ()
  wanted: tuple[str, ...] = ()
  judge: Judge = "contains"
  alternatives: bool = False

  def share_of(self, token: np.ndarray, tokenizer: Any = None) -> float:
    """Share of its answers that a model gave.

    Args:
      token: the most probable one at each step, `[steps]`. Wherever it is not
        the expected one, that one is fed all the same; so the whole answer is
        right exactly where greedy generation would give it.
      tokenizer: ids to text, for `wanted`.
    """
    if self.wanted:
      return self._share_of_text(tokenizer.decode(self.generated(token)))
    answer = np.asarray(self.answer)
    asked = answer >= 0
    right = token[: len(answer)][asked] == answer[asked]
    if not self.turn:
      return float(right.all()) if self.whole else float(right.mean())
    turn = np.asarray(self.turn)[asked]
    return float(np.mean([right[turn == i].all() for i in np.unique(turn)]))

  def generated(self, token: np.ndarray) -> list[int]:
    """The ids that the model added on its own."""
    given = sum(id != OWN for id in self.asked)
    return [int(id) for id in token[given - 1 : len(self.asked)]]

  def _share_of_text(self, text: str) -> float:
    own, scores = words_of(text), []
    for wanted in map(words_of, self.wanted):
      if self.judge == "f1":
        scores.append(f1(own, wanted))
      else:
        scores.append(float(f" {' '.join(wanted)} " in f" {' '.join(own)} "))
    best = self.alternatives or self.judge == "f1"
    return max(scores) if best else sum(scores) / len(scores)


def words_of(text: str) -> list[str]:
  """Words in small letters without punctuation and articles (as SQuAD's)."""
  text = text.lower().translate(str.maketrans("", "", string.punctuation))
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(own: Sequence[str], wanted: Sequence[str]) -> float:
  """Harmonic mean of precision and recall of words, each counted."""
  common = sum((Counter(own) & Counter(wanted)).values())
  return 2 * common / (len(own) + len(wanted)) if common else 0.0


@dataclasses.dataclass(frozen=True)
class Grid:
  """Which questions are asked.

  All but the first tasks need a model of text. The numbers of questions are for
  each length.

  Attributes:
    lengths: of contexts, in tokens.
    depths: of a single needle.
    texts: questions for each length and depth, each in a text of its own.
    pairs: needles of the questions with several.
    several: questions with several needles, for each length.
    known: the question is in the prompt too, as with query-aware methods;
      False: a method compresses before it knows the question.
    seed: of all draws.
    turns: how many of several needles are asked for, one after another, of one
      compressed context; the answers before stand in between.
    also_known: questions with a single needle whose question is in the prompt,
      whatever `known` says.
    values: questions for all of several values of one name.
    tracking: questions for all names of a chain of assignments.
    words: questions for the most common words of a list.
    together: contexts with several tasks at once. Each question is put to the
      same compressed context, so that one prefill answers all of them.
    tasks: of `together`. "single": a needle at each depth; "keys": `pairs`
      needles, of which `turns` are asked for; "values": as many of one name;
      "tracking": a chain.
    files: JSON lines of LongBench or RULER, see
      `experiments.sweeps.task_files`.
    limit, longest, steps: of each file, the most questions and tokens of a
      prompt, and tokens that are generated. Longer ones are left out, which is
      said.
    judge: of files, see `Probe`.
  """

  lengths: tuple[int, ...] = (64, 128, 192)
  depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  texts: int = 8
  pairs: int = 8
  several: int = 16
  known: bool = False
  seed: int = 0
  turns: int = 1
  also_known: int = 0
  values: int = 0
  tracking: int = 0
  words: int = 0
  together: int = 0
  tasks: tuple[Task, ...] = TASKS
  files: tuple[str, ...] = ()
  limit: int = 32
  longest: int = 8192
  steps: int = 32
  judge: Judge = "contains"

  OF_TEXT: ClassVar[tuple[str, ...]] = (
    "also_known", "values", "tracking", "words", "together"
  )  # fmt: skip

  def __post_init__(self):
    for name in ("pairs", "turns", "limit", "longest", "steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    for name in ("texts", "several", *self.OF_TEXT):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
    asked = (self.texts and self.depths, self.several, self.files)
    if not any((*asked, *(getattr(self, name) for name in self.OF_TEXT))):
      raise ValueError(
        f"texts={self.texts}, several={self.several}: nothing is asked; one of"
        f" texts, several, {', '.join(self.OF_TEXT)} must be 1 or more"
      )
    if self.known and self.together:
      raise ValueError(
        f"together={self.together}: questions about one context cannot stand in"
        " the prompt; take known=False"
      )
    if not self.tasks or len(set(self.tasks)) < len(self.tasks):
      raise ValueError(f"tasks={self.tasks}: must be one or more, each once")
    if self.tasks == ("single",) and not self.depths:
      raise ValueError(f"tasks={self.tasks}: 'single' needs depths")
    if self.turns > self.pairs:
      raise ValueError(
        f"turns={self.turns}: there are pairs={self.pairs} to ask for"
      )
    if not self.lengths or min(self.lengths) < 2 * self.pairs:
      raise ValueError(
        f"lengths={self.lengths}: each must hold pairs={self.pairs}"
      )
    if not all(0 <= depth <= 1 for depth in self.depths):
      raise ValueError(f"depths={self.depths}: must lie in [0, 1]")

  def questions(self) -> Iterator[tuple[int, int, float | None]]:
    """Length, pairs and depth of each question about pairs."""
    for length in self.lengths:
      for depth in self.depths:
        yield from [(length, 1, depth)] * self.texts
      yield from [(length, self.pairs, None)] * self.several

  def only_text(self) -> list[str]:
    """Settings that ask for tasks which only a model of text can do."""
    names = (*self.OF_TEXT, "files")
    return [name for name in names if getattr(self, name)] + (
      ["turns"] if self.turns > 1 else []
    )
