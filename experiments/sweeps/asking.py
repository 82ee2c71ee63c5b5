"""Questions and texts in batches, and what models answer with each recipe.

Prompts of about one length are a group, with programs of its own, so that short
ones do not cost what the longest do.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
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


@dataclasses.dataclass(frozen=True)
class Group:
  """Probes of one model whose prompts are padded to one length.

  Attributes:
    model: "recall" or "text".
    shape: of its batches.
    batches: numbers of the probes in each.
  """

  model: str
  shape: Shape
  batches: tuple[tuple[int, ...], ...]


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
  found: dict[tuple[str, int], list[int]] = {}
  probes = [*questions, *texts]
  for number, probe in enumerate(probes):
    model = asked if number < len(questions) else "text"
    key = (model, bucket(len(probe.prompt), buckets))
    found.setdefault(key, []).append(number)
  groups = []
  for model, length in sorted(found, key=lambda key: (-len(key[0]), key[1])):
    # Those of as many steps together.
    numbers = sorted(
      found[model, length], key=lambda i: -len(probes[i].asked)
    )
    steps = len(probes[numbers[0]].asked)
    wide = max(1, min(size, tokens // length, len(numbers)))
    parts = [
      tuple(numbers[begin : begin + wide])
      for begin in range(0, len(numbers), wide)
    ]
    groups.append(Group(model, Shape(wide, length, steps), tuple(parts)))
  return sorted(
    groups, key=lambda group: (group.model != "text", -group.shape.prompt)
  )


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
    self._batches = [(g, part) for g in groups for part in g.batches]
    self._dense, self._kept, self._rounds = dense, kept, rounds
    # The best time of a dense prefill of each group.
    self._ahead: dict[Group, float] = {}
    self._warm: set[tuple[Group, tuple[str, ...]]] = set()

  def __call__(
    self, programs: Sequence[Programs], whole: Programs, told: Told
  ) -> list[Answers]:
    """Answers with each recipe; `whole` is the full cache.

    `told` is called with the number of batches that are done, and of all.
    """
    seeds = self._models.weights
    self._warm_up([*programs, whole])
    found = [
      Answers.empty(len(seeds), self._questions, self._texts) for _ in programs
    ]
    total, done = sum(len(self._turns(n)) for n in range(len(seeds))), 0
    for seed, weights in enumerate(seeds):
      for i, (group, numbers) in self._turns(seed):
        params = weights[group.model == "text"]
        probes = [self._probes[number] for number in numbers]
        batch = Batch.of(probes, group.shape)
        own = [program.of[group] for program in programs]
        is_timed = seed == 0 and i < self._rounds
        again = is_timed and not all(program.shared for program in own)
        key = (seed, numbers)
        record = self._record(key, group, params, batch, again)
        full: list[float] = []
        if is_timed:
          _, _, *full = self._run(whole.of[group], group, params, batch, record)
        for program, answers in zip(own, found, strict=True):
          state, said, *seconds = self._run(
            program, group, params, batch, record
          )
          if is_timed:
            answers.prefill.append((seconds[0], full[0]))
            answers.decode.append((seconds[1], full[1]))
            answers.steps.append(batch.count)
          if i < len(self._batches):
            self._note(answers, program, seed, numbers, state, said)
        done += 1
        told(done, total)
    return found

  def _warm_up(self, every: Sequence[Programs]) -> None:
    """Compiles what the batches that are timed run."""
    timed_ones = itertools.islice(itertools.cycle(self._batches), self._rounds)
    first = dict(reversed(list(timed_ones)))
    for group, numbers in first.items():
      params = self._models.weights[0][group.model == "text"]
      probes = [self._probes[number] for number in numbers]
      batch = Batch.of(probes, group.shape)._replace(count=1)
      if group not in self._ahead:
        jax.block_until_ready(self._dense[group](params, batch))
      record = self._record((0, numbers), group, params, batch, again=False)
      for program in (programs.of[group] for programs in every):
        if (group, program.identity) not in self._warm:
          self._run(program, group, params, batch, record)
          self._warm.add((group, program.identity))

  def _turns(
    self, seed: int
  ) -> list[tuple[int, tuple[Group, tuple[int, ...]]]]:
    """Batches by number; more of them where more have to be timed."""
    count = len(self._batches)
    if seed == 0:
      count = max(count, self._rounds)
    turns = itertools.islice(itertools.cycle(self._batches), count)
    return list(enumerate(turns))

  def _record(self, key, group, params, batch, again: bool) -> State:
    """What the dense prefill of a batch left; its time is noted."""

    def make():
      record, seconds = timed(self._dense[group], params, batch)
      best = self._ahead.get(group, seconds)
      self._ahead[group] = seconds if again else min(best, seconds)
      return record

    return make() if again else self._kept.get(key, make)

  def _run(self, program: Program, group, params, batch, record):
    """State, answers, and seconds of prefill and decoding."""
    state, prefill = program.start(params, batch, record)
    if program.shared:
      prefill += self._ahead[group]
    answers, decode = program.answer(params, state, batch)
    return state, answers, prefill, decode

  def _note(self, answers: Answers, program, seed, numbers, state, said):
    """Writes down what a batch gave."""
    tokenizer = self._models.recall.tokenizer
    text = [number >= self._questions for number in numbers]
    if any(text):
      logical, physical = program.bytes(state)
      answers.logical.extend(logical[: len(numbers)][np.array(text)].tolist())
      answers.physical.extend([physical] * sum(text))
    for row, number in enumerate(numbers):
      probe = self._probes[number]
      if number < self._questions:
        share = probe.share_of(said.token[row], tokenizer)
        answers.right[seed, number] = share
      else:
        loss = said.loss[row, : len(probe.asked)].mean()
        answers.nats[seed, number - self._questions] = loss
