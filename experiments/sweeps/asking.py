"""Questions and texts in batches, and what models answer with each recipe.

Prompts of about one length are a group, with programs of its own, so that short
ones do not cost what the longest do. Questions about the same prompt are asked
of one state: it is prefilled and compressed once.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.sweeps.count import Told
from experiments.sweeps.decoding import (
  Batch,
  Dense,
  Program,
  Shape,
  State,
  timed,
)
from experiments.sweeps.dense_prefill import Kept
from experiments.sweeps.language_models import RecallAndText
from experiments.sweeps.probe import Probe
from experiments.sweeps.subject import Job

# Prompts are padded to a multiple of this at least.
LEAST = 8
# Prompts of a batch: for each, the numbers of the probes that begin with it.
Rows = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Group:
  """Probes of one model whose prompts are padded to one length.

  Attributes:
    model: "recall" or "text".
    shape: of its batches.
    batches: the prompts of each, and what is asked about them.
  """

  model: str
  shape: Shape
  batches: tuple[Rows, ...]


@dataclasses.dataclass(frozen=True)
class Programs:
  """A recipe, built for each group.

  Attributes:
    job: the recipe.
    of: what was built.
    fitted: which options were made smaller for short prompts, in words, or "".
  """

  job: Job
  of: Mapping[Group, Program]
  fitted: str = ""

  @property
  def identity(self) -> tuple[tuple[str, ...], ...]:
    """Equal for recipes that compute the same on these prompts."""
    return tuple(program.identity for program in self.of.values())


@dataclasses.dataclass(frozen=True)
class Answers:
  """What models answer with a recipe, filled batch by batch.

  Attributes:
    right: share of each question's answers that are right, `[seeds, probes]`.
    nats: per token of each text, `[seeds, texts]`.
    logical, physical: bytes of texts' caches that count, and those allocated.
    prefill, decode: seconds of batches: of the recipe, and of the full cache
      next to it.
    steps: how many steps of decoding that were, for each batch.
  """

  right: np.ndarray
  nats: np.ndarray
  logical: list[float] = dataclasses.field(default_factory=list)
  physical: list[float] = dataclasses.field(default_factory=list)
  prefill: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  decode: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  steps: list[int] = dataclasses.field(default_factory=list)

  @classmethod
  def empty(cls, seeds: int, questions: int, texts: int) -> "Answers":
    """Nothing is answered yet."""
    return cls(np.full((seeds, questions), np.nan),
               np.full((seeds, texts), np.nan))  # fmt: skip


def texts_of(models: RecallAndText, context: int) -> list[Probe]:
  """Texts as probes in which every token after the next one is expected.

  That one is fed and not counted, since no cache is read to predict it.
  """
  texts = []
  for name, windows in {models.name: models.windows, **models.more}.items():
    for window in np.asarray(windows).tolist():
      texts.append(
        Probe(
          window[:context], window[context:-1], window[context + 1 :], context,
          -1.0, 0, task=name,
        )
      )  # fmt: skip
  return texts


def bucket(length: int, buckets: Sequence[int]) -> int:
  """The length that a prompt is padded to; see `Language.buckets`."""
  for size in buckets:
    if length <= size:
      return size
  step = max(LEAST, 2 ** (max(length - 1, 1).bit_length() - 4))
  return -(-length // step) * step


def groups_of(
  models: RecallAndText,
  questions: Sequence[Probe],
  texts: Sequence[Probe],
  size: int,
  tokens: int,
  buckets: Sequence[int],
) -> list[Group]:
  """Batches of all probes; those of text first, and of long prompts.

  Args:
    models: one or two.
    questions, texts: numbered in this order.
    size: the most examples of a batch.
    tokens: the most tokens of its prompts.
    buckets: see `bucket`.
  """
  asked = "text" if models.recall is models.text else "recall"
  found: dict[tuple[str, int], dict[tuple[int, ...], list[int]]] = {}
  probes = [*questions, *texts]
  for number, probe in enumerate(probes):
    model = asked if number < len(questions) else "text"
    key = (model, bucket(len(probe.prompt), buckets))
    prompts = found.setdefault(key, {})
    prompts.setdefault(tuple(probe.prompt), []).append(number)
  steps_of = lambda number: len(probes[number].asked)
  groups = []
  for model, length in sorted(found, key=lambda key: (-len(key[0]), key[1])):
    # Those of as many steps together.
    rows = [
      tuple(sorted(numbers, key=steps_of, reverse=True))
      for numbers in found[model, length].values()
    ]
    rows.sort(key=lambda row: -steps_of(row[0]))
    wide = max(1, min(size, tokens // length, len(rows)))
    parts = [
      tuple(rows[begin : begin + wide]) for begin in range(0, len(rows), wide)
    ]
    shape = Shape(wide, length, steps_of(rows[0][0]))
    groups.append(Group(model, shape, tuple(parts)))
  return sorted(
    groups, key=lambda group: (group.model != "text", -group.shape.prompt)
  )


class Turn(NamedTuple):
  """A batch that is run.

  Attributes:
    group, rows: the batch.
    timed: whether its time is taken, next to that of the full cache.
    again: whether it has been answered already.
  """

  group: Group
  rows: Rows
  timed: bool = False
  again: bool = False


class Asker:
  """Asks models with recipes.

  What dense prefills left is computed once, as long as there is room for it.

  Args:
    models: and their weights.
    questions, texts: what they are asked, and read.
    groups: batches of these.
    dense: the recorded prefill of each group.
    kept: what dense prefills left.
    rounds: how many batches are timed.
  """

  def __init__(
    self,
    models: RecallAndText,
    questions: Sequence[Probe],
    texts: Sequence[Probe],
    groups: Sequence[Group],
    dense: Mapping[Group, Dense],
    kept: Kept,
    rounds: int,
  ):
    self._models, self._probes = models, [*questions, *texts]
    self._questions, self._texts = len(questions), len(texts)
    self._groups = groups
    self._dense, self._kept, self._rounds = dense, kept, rounds
    # The best time of a dense prefill of each group.
    self._ahead: dict[Group, float] = {}

  def __call__(
    self, programs: Sequence[Programs], whole: Programs, told: Told
  ) -> list[Answers]:
    """Answers with each recipe; `whole` is the full cache.

    `told` is called with the number of batches that are done, and of all.
    """
    seeds = self._models.weights
    found = [
      Answers.empty(len(seeds), self._questions, self._texts) for _ in programs
    ]
    total, done = sum(len(self._turns(n)) for n in range(len(seeds))), 0
    for seed, weights in enumerate(seeds):
      for group, rows, is_timed, again in self._turns(seed):
        params = weights[group.model == "text"]
        asked = self._asked(group, rows)
        first = asked[0][1]
        own = [program.of[group] for program in programs]
        beside = is_timed and not all(program.shared for program in own)
        record = self._record((seed, rows), group, params, first, beside)
        full = (0.0, 0.0)
        if is_timed:
          state, ahead = self._start(
            whole.of[group], group, params, first, record
          )
          full = ahead, whole.of[group].answer(params, state, first)[1]
        for program, answers in zip(own, found, strict=True):
          state, prefill = self._start(program, group, params, first, record)
          part = asked[:1] if again else asked
          for turn, (numbers, batch) in enumerate(part):
            said, decode = program.answer(params, state, batch)
            if is_timed and turn == 0:
              answers.prefill.append((prefill, full[0]))
              answers.decode.append((decode, full[1]))
              answers.steps.append(batch.count)
            if not again:
              self._note(answers, program, seed, numbers, state, said)
        done += 1
        told(done, total)
    return found

  def _asked(
    self, group: Group, rows: Rows
  ) -> list[tuple[list[int | None], Batch]]:
    """What prompts are asked, a question of each at a time, and its number.

    Where others have more questions, nothing is asked (None).
    """
    found = []
    for turn in range(max(map(len, rows))):
      numbers = [row[turn] if turn < len(row) else None for row in rows]
      probes = [
        self._probes[row[0]]._replace(asked=(), answer=())
        if number is None
        else self._probes[number]
        for row, number in zip(rows, numbers, strict=True)
      ]
      found.append((numbers, Batch.of(probes, group.shape)))
    return found

  def _turns(self, seed: int) -> list[Turn]:
    """All batches; of the first seed as many as `rounds` are timed.

    Those of the longest prompts, but not the first of a group, which compiles:
    a group with one batch runs it again.
    """
    every = [Turn(g, rows) for g in self._groups for rows in g.batches]
    if seed or not every:
      return every
    warm = [
      Turn(group, rows, timed=True, again=len(group.batches) == 1)
      for group in self._groups
      for rows in (group.batches[1:] or group.batches)
    ]
    chosen = [*itertools.islice(itertools.cycle(warm), self._rounds)]
    answered = {turn[:2] for turn in chosen if not turn.again}
    return [
      *(turn._replace(timed=turn[:2] in answered) for turn in every),
      *(
        turn._replace(again=True)
        for i, turn in enumerate(chosen)
        if turn.again or i >= len(warm)
      ),
    ]

  def _record(self, key, group, params, batch, beside: bool) -> State:
    """What the dense prefill of a batch left; its time is noted.

    `beside`: it is run now, next to prefills that are timed.
    """

    def make():
      if group not in self._ahead:  # The first run compiles.
        timed(self._dense[group], params, batch)
      record, seconds = timed(self._dense[group], params, batch)
      best = self._ahead.get(group, seconds)
      self._ahead[group] = seconds if beside else min(best, seconds)
      return record

    return make() if beside else self._kept.get(key, make)

  def _start(self, program: Program, group, params, batch, record):
    """State after the prompts, and the seconds of all of the prefill."""
    state, prefill = program.start(params, batch, record)
    if program.shared:
      prefill += self._ahead[group]
    return state, prefill

  def _note(self, answers: Answers, program, seed, numbers, state, said):
    """Writes down what a batch gave."""
    tokenizer = self._models.recall.tokenizer
    text = [n is not None and n >= self._questions for n in numbers]
    if any(text):
      logical, physical = program.bytes(state)
      answers.logical.extend(logical[: len(numbers)][np.array(text)].tolist())
      answers.physical.extend([physical] * sum(text))
    for row, number in enumerate(numbers):
      if number is None:
        continue
      probe = self._probes[number]
      if number < self._questions:
        share = probe.share_of(said.token[row], tokenizer)
        answers.right[seed, number] = share
      else:
        loss = said.loss[row, : len(probe.asked)].mean()
        answers.nats[seed, number - self._questions] = loss
