"""Sweeps of vision-language models: right answers, FLOPs, bytes and times."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import typed
from experiments.sweeps import (
  intervals,
  question_budget,
  question_report,
  question_views,
)
from experiments.sweeps.count import Told
from experiments.sweeps.probe import words_of
from experiments.sweeps.programs import speedup
from experiments.sweeps.question_models import (
  QUESTION_MODELS,
  Asked,
  QuestionModel,
)
from experiments.sweeps.question_programs import Program, build, pack
from experiments.sweeps.report import Plot, Table
from experiments.sweeps.results import Results, Row
from experiments.sweeps.subject import Job, OptionsSweep
from tokjax.models.generation import Generation

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Questions(OptionsSweep):
  """Settings of a sweep of a vision-language model.

  Attributes:
    subject: the model and its questions; "trained_questions" or
      "published_questions".
    keeps: fractions of the visual tokens that remain at the end.
    answer: tokens of an answer that are generated to score it.
    steps: of decoding that are timed, for each batch.
    pictures: number of images of `kept.png`.
  """

  subject: Annotated[Any, typed.OneOf(QUESTION_MODELS)]
  families: tuple[str, ...] = ("vlm",)
  keeps: tuple[float, ...] = (0.5, 0.25, 0.125)
  picture_keep: float = 0.25
  answer: int = 1
  steps: int = 8
  pictures: int = 4

  SUBJECTS = QUESTION_MODELS
  STEM, PICTURE = "vlm_pareto", "kept.png"
  DEPENDS = ("subject", "batch_size", "options", "answer")
  NOTHING = "none"
  TOGETHER = 4

  def __post_init__(self):
    super().__post_init__()
    self.at_least_one("answer", "steps", "pictures")

  def prepare(self, workdir: pathlib.Path) -> "QuestionsSubject":
    """See `Sweep.prepare`."""
    return QuestionsSubject(self, self.subject.prepare(workdir))


@dataclasses.dataclass(frozen=True)
class QuestionsSubject:
  """A vision-language model under the settings of a sweep; a `Subject`."""

  settings: Questions
  model: QuestionModel

  @property
  def origin(self) -> str:
    return self.model.origin

  @functools.cached_property
  def _kind(self) -> np.ndarray:
    """Of each question."""
    return np.array([one.question.kind for one in self.model.asked])

  def compile(self, job: Job) -> Program:
    """See `Subject.compile`."""
    room = max(self.settings.steps, self.settings.answer)
    return build(self.model, job, self.settings.batch_size, room)

  def score(
    self, programs: Sequence[Program], whole: Program, told: Told
  ) -> list[Row]:
    """Right answers by kind of question, drift, FLOPs and bytes.

    Means over seeds; intervals are those of `intervals.lost`, question by
    question. Drift is the mean Kullback-Leibler divergence of the first token
    from the unreduced model's, in nats. Random recipes draw the same keys in
    every run. FLOPs and bytes are those of one question.
    """
    right, logits = self._answers(whole)
    rows = []
    for n, program in enumerate(programs):
      own, moved = right, np.zeros(right.shape)
      if program is not whole:
        own, other = self._answers(program)
        moved = (np.exp(logits) * (logits - other)).sum(axis=-1)
      row = {**self._row(right, own, moved), **self._sizes(program)}
      kept, looks = question_views.kept(self.model, program.job), None
      if program is whole:
        looks = question_views.looks(self.model, program.job)
      rows.append({**row, **kept, "looks": looks})
      told(n + 1, len(programs))
    return rows

  def _answers(self, program: Program) -> tuple[np.ndarray, np.ndarray]:
    """Which are right, `[seeds, n]`; log probabilities of first tokens."""
    right, logits = [], []
    for params in self.model.weights:
      hits, found, begin = [], [], 0
      for i, batch in enumerate(program.batches):
        going = program.run(params, batch.prompts, jax.random.key(i))
        log_p = jax.nn.log_softmax(going.logits)[: batch.real]
        said = np.stack(program.decode(params, going, self.settings.answer), 1)
        asked = self.model.asked[begin : (begin := begin + batch.real)]
        hits += [self._right(*both) for both in zip(asked, said, strict=False)]
        found.append(np.asarray(log_p))
      right.append(hits)
      logits.append(np.concatenate(found))
    return np.array(right), np.stack(logits)

  def _right(self, asked: Asked, said: np.ndarray) -> bool:
    """Whether generated tokens, up to an end, contain the answer's words."""
    tokenizer, ids = self.model.tokenizer, said.tolist()
    ends = [i for i, token in enumerate(ids) if token in tokenizer.ends]
    text = tokenizer.decode(ids[: min(ends, default=len(ids))])
    own, wanted = words_of(text), words_of(asked.question.answer)
    return f" {' '.join(wanted)} " in f" {' '.join(own)} "

  def _row(self, right: np.ndarray, own: np.ndarray, moved: np.ndarray) -> Row:
    """What is scored of one program."""
    row: Row = {}
    for kind in (ALL, *self.model.kinds):
      chosen = (self._kind == kind) | (kind == ALL)
      row[f"accuracy_{kind}"] = float(own[:, chosen].mean())
      found = intervals.lost(right[:, chosen], own[:, chosen])
      row[f"lost_{kind}"] = found["lost"]
      row[f"lost_{kind}_interval"] = found["lost_interval"]
      row[f"lost_{kind}_by_seed"] = found["lost_by_seed"]
    right_words = question_budget.words_of(own)
    return {**row, "right": right_words, "drift": float(moved.mean())}

  def _sizes(self, program: Program) -> Row:
    """Tokens, FLOPs and bytes of one question."""
    going = self._prefilled(program)
    size, held = self.settings.batch_size, program.generator.bytes(going)
    logical = np.broadcast_to(np.asarray(held.logical), (size,))
    return {
      "image_tokens": program.generator.image_tokens,
      "gflops": program.cost.flops / size / 1e9,
      "gflops_exact": program.cost.exact,
      "logical_bytes": float(logical.mean()),
      "physical_bytes": held.physical / size,
    }

  def _prefilled(self, program: Program) -> Generation:
    """What the first batch left."""
    prompts = program.batches[0].prompts
    return program.run(self.model.params, prompts, jax.random.key(0))

  def calls(self, program: Program) -> dict[str, Callable[[], Any]]:
    """What is timed: prefill, the way to the first token, and decoding.

    The first token counts from prompts and pixels on the host to its id there.
    """
    params, key = self.model.params, jax.random.key(0)
    prompts, going = program.batches[0].prompts, self._prefilled(program)
    size, asked = self.settings.batch_size, self.model.asked

    def first():
      packed = pack(program.generator, asked[:size], size)
      logits = program.run(params, packed.prompts, key).logits
      return np.asarray(logits.argmax(-1))

    # Steps use buffers up; to copy them is a small part of the time.
    def decode():
      copy = jax.tree.map(jnp.copy, going)
      return program.decode(params, copy, self.settings.steps)

    run = lambda: program.run(params, prompts, key)
    found = {"prefill": run, "first": first, "decode": decode}
    # Compiles the steps.
    jax.block_until_ready([call() for call in found.values()])
    return found

  def speed(self, seconds: Mapping[str, np.ndarray]) -> Row:
    """Milliseconds of a batch by the best round; speed-ups."""
    best = {name: 1e3 * float(x[:, 0].min()) for name, x in seconds.items()}
    best["decode"] /= max(self.settings.steps - 1, 1)
    times = {f"{name}_ms": value for name, value in best.items()}
    ups = {f"{name}_speedup": speedup(x) for name, x in seconds.items()}
    return {**times, **ups}

  def plot(self, results: Results) -> Plot:
    """See `Subject.plot`."""
    return question_report.plot(results, (ALL, *self.model.kinds))

  def table(self, results: Results) -> Table:
    """See `Subject.table`."""
    return question_report.table(results, self.model.kinds)

  def picture(
    self, results: Results, methods: Sequence[str], path: pathlib.Path
  ) -> None:
    """Which patches each method leaves of the first images."""
    del results
    keep, asked = self.settings.picture_keep, self.model.asked
    question_views.draw(
      self.model, asked[: self.settings.pictures],
      [self.settings.job(method, keep) for method in methods], path,
      title=f"Patches that remain, keep {keep:g}",
    )  # fmt: skip
