"""Questions about a long context, by its length and the depth of the answer.

A probe is a prompt, tokens that are then fed one by one, and the answers
expected at each. The prompt ends before the question does, so that a cache has
to answer from what it kept.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.recall import Recall


class Probe(NamedTuple):
  """One question.

  Attributes:
    prompt: ids.
    asked, answer: ids fed after the prompt, and those expected at each; -1
      where nothing is asked. Of one length for all probes.
    length, depth, pairs: of the context in tokens, of the needle between 0
      and 1 (-1: anywhere), and how many could be asked for.
    whole: the answers are tokens of one, which is right if all of them are;
      False: each is an answer of its own.
  """

  prompt: Sequence[int]
  asked: Sequence[int]
  answer: Sequence[int]
  length: int
  depth: float
  pairs: int
  whole: bool = False

  def share_of(self, token: np.ndarray) -> float:
    """Share of its answers that a model gave.

    Args:
      token: the most probable one at each step, `[steps]`. Wherever it is not
        the expected one, that one is fed all the same; so the whole answer is
        right exactly where greedy generation would give it.
    """
    answer = np.asarray(self.answer)
    asked = answer >= 0
    right = token[asked] == answer[asked]
    return float(right.all()) if self.whole else float(right.mean())


@dataclasses.dataclass(frozen=True)
class Grid:
  """Which questions are asked.

  Attributes:
    lengths: of contexts, in tokens.
    depths: of a single needle.
    texts: questions for each length and depth.
    pairs: needles of the questions with several.
    several: questions with several needles, for each length.
    known: the question is in the prompt too, as with query-aware methods;
      False: a method compresses before it knows the question.
    seed: of all draws.
  """

  lengths: tuple[int, ...] = (64, 128, 192)
  depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  texts: int = 8
  pairs: int = 8
  several: int = 16
  known: bool = False
  seed: int = 0

  def __post_init__(self):
    for name in ("texts", "pairs"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    if not self.lengths or min(self.lengths) < 2 * self.pairs:
      raise ValueError(
        f"lengths={self.lengths}: each must hold pairs={self.pairs}"
      )
    if not all(0 <= depth <= 1 for depth in self.depths):
      raise ValueError(f"depths={self.depths}: must lie in [0, 1]")

  def questions(self) -> Iterator[tuple[int, int, float | None]]:
    """Length, pairs and depth of each question."""
    for length in self.lengths:
      for depth in self.depths:
        yield from [(length, 1, depth)] * self.texts
      yield from [(length, self.pairs, None)] * self.several


# Asked one after another about the same text.
QUESTIONS = 4


def of_recall(data: Recall, grid: Grid) -> list[Probe]:
  """Probes of the associative recall that a model was trained on."""
  rng, out = np.random.default_rng((grid.seed, 2)), []

  def add(length, pairs, depth):
    text = data.text(rng, length, pairs, depth)
    which = rng.integers(0, pairs, QUESTIONS)
    if pairs >= QUESTIONS:
      which = rng.permutation(pairs)[:QUESTIONS]
    asked, answer = text.keys[which], text.values[which]
    prompt = [*text.context, *asked] if grid.known else [*text.context]
    if pairs == 1:  # asking the same question again measures nothing new
      answer = np.where(np.arange(QUESTIONS) == 0, answer, -1)
    at = -1.0 if depth is None else depth
    out.append(Probe(prompt, asked, answer, length, at, pairs))

  for where in grid.questions():
    add(*where)
  return out


NEEDLE = "\nThe secret number of {name} is {number}.\n"
QUESTION = (
  "\nQuestion: what is the secret number of {name}?\nAnswer: The secret number"
  " of {name} is"
)
NAMES = (
  "Alice", "Bob", "Carol", "David", "Erin", "Frank", "Grace", "Henry",
  "Irene", "Jack", "Karen", "Liam", "Maria", "Nora", "Oscar", "Paula",
)  # fmt: skip


def of_text(tokenizer: Any, corpus: bytes, grid: Grid) -> list[Probe]:
  """Needles in a haystack for a published model.

  Sentences with secret numbers are put into a text; the model is asked for one.
  What is fed is the end of the question and the answer, which counts if all of
  it is right. A token of spaces in front of the number is fed and not asked:
  every model gives it, whatever its cache kept.
  """
  rng = np.random.default_rng((grid.seed, 3))
  raw, hay = tokenizer.encode(corpus.decode(errors="ignore")), []

  def add(length, pairs, depth):
    names = rng.permutation(NAMES)[:pairs]
    numbers = rng.integers(10_000, 99_999, pairs)
    needles = [
      tokenizer.encode(NEEDLE.format(name=n, number=x))
      for n, x in zip(names, numbers, strict=True)
    ]
    room = max(length - sum(map(len, needles)), 0)
    begin = int(rng.integers(0, max(len(raw) - room, 1)))
    text = raw[begin : begin + room]
    spots = rng.random(pairs) if depth is None else np.full(pairs, depth)
    for spot, needle in sorted(
      zip(spots, needles, strict=True), key=lambda x: -x[0]
    ):
      at = round(spot * len(text))
      text = [*text[:at], *needle, *text[at:]]
    question = QUESTION.format(name=names[0])
    bare = tokenizer.encode(question)
    whole = tokenizer.encode(f"{question} {numbers[0]}")
    answer = whole[len(bare) :]
    expected = [
      -1 if i == 0 and not tokenizer.decode([token]).strip() else token
      for i, token in enumerate(answer)
    ]
    first = bare if not grid.known else bare[-1:]
    prompt = [*text, *(bare[:-1] if grid.known else [])]
    asked = [*first, *answer[:-1]]
    blank = [-1] * (len(first) - 1)
    at = -1.0 if depth is None else depth
    hay.append(
      Probe(prompt, asked, [*blank, *expected], length, at, pairs, whole=True)
    )

  for where in grid.questions():
    add(*where)
  return same_steps(hay)


def same_steps(probes: list[Probe]) -> list[Probe]:
  """Probes padded to one number of steps, in which nothing is asked."""
  steps = max(len(probe.asked) for probe in probes)
  out = []
  for probe in probes:
    more = steps - len(probe.asked)
    asked = [*probe.asked, *[probe.asked[-1]] * more]
    out.append(
      probe._replace(asked=asked, answer=[*probe.answer, *[-1] * more])
    )
  return out


def recall_of(right: np.ndarray, asked: Sequence[Probe]) -> dict[str, Any]:
  """Shares of right answers: over all, by length and depth, by length.

  "recall_map" has a row for each length and a column for each depth.

  Args:
    right: share of right answers to each probe, `[probes]`.
    asked: the probes.
  """
  length = np.array([probe.length for probe in asked])
  depth = np.array([probe.depth for probe in asked])
  single = depth >= 0
  lengths, depths = np.unique(length), np.unique(depth[single])
  share = lambda where: float(right[where].mean()) if where.any() else None
  return {
    "recall": share(single),
    "multi_key_recall": share(~single),
    "lengths": lengths.tolist(),
    "depths": depths.tolist(),
    "recall_map": [
      [share(single & (length == n) & (depth == d)) for d in depths]
      for n in lengths
    ],
    "multi_key_by_length": [share(~single & (length == n)) for n in lengths],
  }
