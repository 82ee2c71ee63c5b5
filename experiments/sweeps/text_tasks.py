"""Questions to a model of text about what was put into a long one.

single     one sentence with a secret number
known      the same; the question stands in the prompt
keys       several such sentences, of which some are asked for in turn
values     several numbers of one name, all of which are asked for
tracking   a chain of assignments; all names with the first one's value
words      a list of words; those that stand in it most often
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.sweeps import task_files
from experiments.sweeps.probe import NOTHING, OWN, Grid, Probe, Task

NEEDLE = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nAnswer: The secret number of {name} is"
VALUES = "\nAnswer: The secret numbers of {name} are"
ASSIGNED = "\nThe variable {name} has the value {value}.\n"
SAME = "\nThe variable {name} has the value of {other}.\n"
TRACKING = "\nAnswer: The variables with the value {value} are"
WORDS = (
  "\nQuestion: Which {count} words stand most often in this list?\nAnswer: The"
  " {count} words that stand most often in it are"
)
NAMES = (
  "Alice", "Bob", "Carol", "David", "Erin", "Frank", "Grace", "Henry",
  "Irene", "Jack", "Karen", "Liam", "Maria", "Nora", "Oscar", "Paula",
)  # fmt: skip
# Length of the chain of `tracking`; common words, how many of a hundred words
# are one of them each, and the tokens that are generated to name them.
HOPS, COMMON, PERCENT, STEPS = 3, 3, 12, 24


class Fact(NamedTuple):
  """What is put into a text, and asked about it.

  Attributes:
    task: what kind of question it is.
    needles: sentences, in their order.
    said: pieces of question and answer, see `pieces_of`.
    depth: of the needles, between 0 and 1; None: anywhere.
  """

  task: str
  needles: Sequence[str]
  said: Sequence[tuple[str, bool]]
  depth: float | None = None


def of_text(tokenizer: Any, corpus: bytes, grid: Grid) -> list[Probe]:
  """Probes for a model of text, in a text.

  What is fed is the question and the answer, which counts if all of it is
  right. A token of spaces in front of a number is fed and not asked: every
  model gives it, whatever its cache kept. Prompts are never longer than the
  grid's lengths.

  Raises:
    ValueError: what is to be remembered is longer than a length.
  """
  tasks = TextTasks(tokenizer, corpus.decode(errors="ignore"), grid)
  probes = [tasks.needles(*where) for where in grid.questions()]
  for length in grid.lengths:
    for count, make in (
      (grid.also_known, tasks.known),
      (grid.values, tasks.values),
      (grid.tracking, tasks.tracking),
      (grid.words, tasks.words),
    ):
      probes += [make(length) for _ in range(count)]
    for _ in range(grid.together):
      probes += tasks.together(length)
  for path in grid.files:
    probes += task_files.probes_of(path, tokenizer, grid)
  return probes


class TextTasks:
  """Makes probes; all draws come from one generator.

  Attributes:
    tokenizer: text to ids and back.
    grid: the settings.
  """

  def __init__(self, tokenizer: Any, text: str, grid: Grid):
    self.tokenizer, self.grid = tokenizer, grid
    self._rng = np.random.default_rng((grid.seed, 3))
    self._ids = tokenizer.encode(text)
    self._words = sorted(set(re.findall(r"\b[a-z]{4,8}\b", text)))

  def needles(self, length: int, pairs: int, depth: float | None) -> Probe:
    """One needle at a depth (None: anywhere), or several."""
    names = self._rng.permutation(NAMES)[:pairs]
    return self._probe(length, self._keys(names, depth), self.grid.known)

  def known(self, length: int) -> Probe:
    """One needle anywhere; the question stands in the prompt."""
    fact = self._keys([self._rng.choice(NAMES)], None)
    return self._probe(length, fact._replace(task="known"), True)

  def values(self, length: int) -> Probe:
    """Several numbers of one name, in the order in which they stand there."""
    fact = self._values(self._rng.choice(NAMES))
    return self._probe(length, fact, self.grid.known)

  def tracking(self, length: int) -> Probe:
    """A chain: a value, a name that has it, names that have its value."""
    fact = self._chain(self._rng.permutation(NAMES)[:HOPS])
    return self._probe(length, fact, self.grid.known)

  def together(self, length: int) -> list[Probe]:
    """All of `tasks` in one context, and a question about each.

    Raises:
      ValueError: there are not as many names.
    """
    grid = self.grid
    # How many names each fact needs, and what it is made by.
    makers: dict[Task, list[tuple[int, Callable[[Any], Fact]]]] = {
      "single": [
        (1, functools.partial(self._keys, depth=at)) for at in grid.depths
      ],
      "keys": [(grid.pairs, functools.partial(self._keys, depth=None))],
      "values": [(1, lambda names: self._values(names[0]))],
      "tracking": [(HOPS, self._chain)],
    }
    chosen = [made for task in grid.tasks for made in makers[task]]
    ends = np.cumsum([size for size, _ in chosen])
    if ends[-1] > len(NAMES):
      raise ValueError(
        f"grid.together={grid.together}: needs {ends[-1]} names with"
        f" {len(grid.depths)} depths and pairs={grid.pairs}; there are"
        f" {len(NAMES)}"
      )
    parts = np.split(self._rng.permutation(NAMES), ends)
    facts = [
      make(part) for (_, make), part in zip(chosen, parts, strict=False)
    ]
    context = self._context(length, facts)
    return [
      self._asked(length, fact, context, *pieces_of(self.tokenizer, fact.said))
      for fact in facts
    ]

  def _keys(self, names: Sequence[str], depth: float | None) -> Fact:
    """A number for each name; some are asked for in turn."""
    numbers = self._rng.integers(10_000, 99_999, len(names))
    turns = 1 if len(names) == 1 else self.grid.turns
    said = [
      part
      for name, number in zip(names[:turns], numbers, strict=False)
      for part in ((QUESTION.format(name=name), False), (f" {number}", True))
    ]
    needles = [
      NEEDLE.format(name=name, number=number)
      for name, number in zip(names, numbers, strict=True)
    ]
    return Fact("keys" if depth is None else "single", needles, said, depth)

  def _values(self, name: str) -> Fact:
    numbers = self._rng.integers(10_000, 99_999, self.grid.pairs)
    needles = [NEEDLE.format(name=name, number=number) for number in numbers]
    said = [(VALUES.format(name=name), False), *_listed(numbers)]
    return Fact("values", needles, said)

  def _chain(self, names: Sequence[str]) -> Fact:
    value = self._rng.integers(10_000, 99_999)
    chain = [ASSIGNED.format(name=names[0], value=value)]
    for other, name in zip(names, names[1:], strict=False):
      chain.append(SAME.format(name=name, other=other))
    said = [(TRACKING.format(value=value), False), *_listed(names)]
    return Fact("tracking", chain, said)

  def words(self, length: int) -> Probe:
    """A list of words; the text is no other."""
    words = self._rng.permutation(self._words).tolist()
    common, rare = words[:COMMON], words[COMMON:]
    question = self.tokenizer.encode(WORDS.format(count=COMMON))
    room = length - (len(question) if self.grid.known else 0)
    # More than fit, whose end is cut off.
    drawn = [
      common[at] if at < COMMON else rare[self._rng.integers(len(rare))]
      for at in self._rng.integers(0, 100, room) // PERCENT
    ]
    prompt = self.tokenizer.encode(", ".join(drawn))[:room]
    first = question[-1:] if self.grid.known else question
    prompt += question[:-1] if self.grid.known else []
    asked = [*first, *[OWN] * STEPS]
    return Probe(
      prompt, asked, [NOTHING] * len(asked), length, -1.0, COMMON,
      task="words", wanted=tuple(common),
    )  # fmt: skip

  def _probe(self, length: int, fact: Fact, known: bool) -> Probe:
    """One fact in a text, whose question may stand in the prompt."""
    ids, expected, turn = pieces_of(self.tokenizer, fact.said)
    lead = expected.index(True) - 1 if known else 0
    context = self._context(length - lead, [fact])
    return self._asked(
      length, fact, [*context, *ids[:lead]], ids[lead:], expected[lead:],
      turn[lead:],
    )  # fmt: skip

  def _context(self, length: int, facts: Sequence[Fact]) -> list[int]:
    """A part of the text with needles; those of a fact are in their order."""
    placed = []
    for fact in facts:
      spots = np.full(len(fact.needles), fact.depth)
      if fact.depth is None:
        spots = np.sort(self._rng.random(len(fact.needles)))
      hidden = map(self.tokenizer.encode, fact.needles)
      placed += zip(spots.tolist(), hidden, strict=True)
    room = length - sum(len(needle) for _, needle in placed)
    if room < 0:
      raise ValueError(
        f"grid.lengths: {length} tokens are too few for what is hidden in them,"
        f" {length - room}; take longer ones, or fewer pairs"
      )
    begin = int(self._rng.integers(0, max(len(self._ids) - room, 1)))
    text = self._ids[begin : begin + room]
    size = len(text)
    for spot, needle in sorted(placed, key=lambda one: one[0])[::-1]:
      at = round(spot * size)
      text = [*text[:at], *needle, *text[at:]]
    return text

  @staticmethod
  def _asked(
    length: int, fact: Fact, prompt: Sequence[int], ids: Sequence[int],
    expected: Sequence[bool], turn: Sequence[int],
  ) -> Probe:  # fmt: skip
    """The question about a fact after a prompt."""
    answer = [
      id if right else NOTHING
      for id, right in zip(ids[1:], expected[1:], strict=True)
    ]
    return Probe(
      prompt, ids[:-1], answer, length,
      -1.0 if fact.depth is None else fact.depth, len(fact.needles),
      whole=True, task=fact.task, turn=turn[1:],
    )  # fmt: skip


def _listed(answers: Sequence[Any]) -> list[tuple[str, bool]]:
  """`12, 34`, of which numbers and not commas are asked for."""
  parts: list[tuple[str, bool]] = []
  for answer in answers:
    parts += [(",", False)] if parts else []
    parts.append((f" {answer}", True))
  return parts


def pieces_of(
  tokenizer: Any, said: Sequence[tuple[str, bool]]
) -> tuple[list[int], list[bool], list[int]]:
  """Ids of a text that is said in pieces.

  Args:
    tokenizer: text to ids and back.
    said: pieces, and whether each is an answer.

  Returns:
    Ids, whether each is expected of the model (a leading token of spaces is
    not), and the number of its piece.
  """
  encode: Callable[[str], list[int]] = tokenizer.encode
  text, ids = "", []
  expected: list[bool] = []
  turn: list[int] = []
  for i, (piece, asked) in enumerate(said):
    text += piece
    whole = encode(text)
    # Pieces that the tokenizer would join with those before stay apart.
    new = whole[len(ids) :] if whole[: len(ids)] == ids else encode(piece)
    ids = [*ids, *new]
    blank = bool(new) and not tokenizer.decode(new[:1]).strip()
    expected += [asked and not (blank and at == 0) for at in range(len(new))]
    turn += [i] * len(new)
  return ids, expected, turn
