"""The sweep of language models: recall, perplexity, bytes, decode time.

Part of `experiments.sweep`, which takes its config too; see
`configs/kv_pareto.py`.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from experiments import typed
from experiments.sweeps import language_programs, probes
from experiments.sweeps import language_results as results_lib
from experiments.sweeps import programs as programs_lib
from experiments.sweeps.count import Count
from experiments.sweeps.language import SUBJECTS, Subject
from experiments.sweeps.language_programs import Program, Shape
from experiments.sweeps.programs import Job, Unfit
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class LanguageSweep:
  """What is compared.

  Attributes:
    subject: models and questions; "carriers" or "checkpoint".
    recipes: names; empty: all of `families` that need no training.
    families: see `tokjax.recipes.names`.
    keeps: fractions of the prompt that remain.
    options: of recipes, by name, where their own defaults are made for longer
      contexts or deeper models than the subject's.
    grid: questions about long contexts.
    batch_size: of all programs.
    texts, context, steps: held-out texts, tokens of each that are the prompt,
      and tokens after it.
    rounds: how often each program is timed.
    threads: that compile.
    picture_keep: fraction at which the heat maps are drawn.
  """

  subject: Annotated[Any, typed.OneOf(SUBJECTS)]
  recipes: tuple[str, ...] = ()
  families: tuple[str, ...] = ("cache", "llm")
  keeps: tuple[float, ...] = (0.5, 0.25, 0.125)
  options: dict[str, Any] = ()
  grid: probes.Grid = probes.Grid()
  batch_size: int = 16
  texts: int = 32
  context: int = 192
  steps: int = 64
  rounds: int = 5
  threads: int = 2
  picture_keep: float = 0.25

  def __post_init__(self):
    for name in ("batch_size", "context", "steps", "rounds", "threads"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    if self.texts < self.batch_size or self.texts % self.batch_size:
      raise ValueError(
        f"texts={self.texts}: must be a multiple of"
        f" batch_size={self.batch_size}"
      )
    for keep in (*self.keeps, self.picture_keep):
      if not 0 < keep <= 1:
        raise ValueError(f"keeps: {keep} is not in (0, 1]")

  def methods(self) -> tuple[str, ...]:
    """Names of the recipes to compare, without the full cache.

    Raises:
      KeyError: an unknown recipe.
    """
    return programs_lib.methods(self.recipes, self.families, "full")

  def job(self, name: str, keep: float) -> Job:
    """A recipe with its options."""
    options = dict(dict(self.options).get(name, {}))
    return Job(name, keep, tuple(sorted(options.items())))

  def fingerprint(self) -> dict[str, Any]:
    """What rows depend on: with another value they have to be made again."""
    names = (
      "subject",
      "options",
      "grid",
      "batch_size",
      "texts",
      "context",
      "steps",
    )
    values = typed.to_dict(self)
    return {name: values[name] for name in names}


@dataclasses.dataclass
class Pair:
  """A job's programs: for questions and for text.

  Attributes:
    recall, text: one program each.
    seconds: of the decode steps of `text`, and of the full cache's next to
      them.
    prompting: the same of its prefill.
  """

  job: Job
  recall: Program
  text: Program
  seconds: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  prompting: list[tuple[float, float]] = dataclasses.field(default_factory=list)


def main(
  config: LanguageSweep, workdir: pathlib.Path
) -> results_lib.LanguageResults:
  """Runs the sweep; everything is written under `workdir`."""
  began, methods = time.perf_counter(), config.methods()
  length = config.context + config.steps + 1
  subject = config.subject.prepare(workdir, config.grid, config.texts, length)
  results = results_lib.LanguageResults(
    workdir / "kv_pareto.json", config.fingerprint()
  )
  rounds = list(todo(config, methods, results))
  with Count(sum(map(len, rounds)), "programs") as count:
    if rounds:
      whole = compile_pair(config, subject, Job("none", None))
      if not results.has("none", 1.0):
        measure([whole], whole, subject, config)
        row = row_of(whole, subject, config)
        results.save([{**row, "keep": 1.0}])
    for jobs in rounds:
      make = lambda job: compile_pair(config, subject, job)
      ready, unfit = programs_lib.compile_round(
        make, jobs, config.threads, count
      )
      measure(ready, whole, subject, config)
      rows = [row_of(pair, subject, config) for pair in ready]
      results.save(rows, unfit)
  results.draw(workdir, config.picture_keep, subject.origin)
  results.show()
  print(
    f"{time.perf_counter() - began:.0f} s; {workdir}/kv_pareto.json,"
    " kv_pareto.png, recall.png"
  )
  return results


def todo(
  config: LanguageSweep,
  methods: Sequence[str],
  results: results_lib.LanguageResults,
) -> Iterator[list[Job]]:
  """The jobs that are left, a round for each keep ratio.

  A recipe that no keep ratio changes has one row, at keep 1.
  """
  for keep in (1.0, *config.keeps):
    jobs = [config.job(name, keep) for name in methods]
    jobs = [job for job in jobs if turns(job) != (keep == 1.0)]
    jobs = [job for job in jobs if not results.has(job.method, job.keep)]
    if jobs:
      yield jobs


def turns(job: Job) -> bool:
  """Whether a keep ratio changes a recipe."""
  try:
    slots: Slots = dataclasses.replace(job, keep=None).slots()
    return slots.with_keep(0.5) != slots.with_keep(0.25)
  except ValueError:
    return True


def compile_pair(config: LanguageSweep, subject: Subject, job: Job) -> Pair:
  """Raises Unfit where the recipe cannot be had."""
  longest = max(len(probe.prompt) for probe in subject.probes)
  asked = Shape(config.batch_size, longest, len(subject.probes[0].asked))
  read = Shape(config.batch_size, config.context, config.steps)
  compiled = language_programs.compile_one
  try:
    return Pair(
      job,
      compiled(subject.recall, job, asked),
      compiled(subject.text, job, read),
    )
  except ValueError as error:
    if isinstance(error, Unfit):
      raise
    raise Unfit(job, str(error)) from error


def measure(
  pairs: Sequence[Pair], whole: Pair, subject: Subject, config: LanguageSweep
) -> None:
  """Times prefill and decode steps, in turn with the full cache's."""
  n, size = config.context, config.batch_size
  part = subject.windows[:size].astype(np.int32)
  length = np.full(size, n, np.int32)
  fed, meant = part[:, n:-1], part[:, n + 1 :]
  begin = lambda pair: pair.text.start(part[:, :n], length)
  going = {id(pair): begin(pair) for pair in (*pairs, whole)}
  jax.block_until_ready(going)

  def steps(pair: Pair):
    return pair.text.go_on(going[id(pair)], fed, meant)

  programs_lib.measure(pairs, whole, steps, config.rounds)
  kept = [list(pair.seconds) for pair in pairs]
  for pair in pairs:
    pair.seconds.clear()
  programs_lib.measure(pairs, whole, begin, config.rounds)
  for pair, seconds in zip(pairs, kept, strict=True):
    pair.prompting[:], pair.seconds[:] = pair.seconds, seconds


def row_of(pair: Pair, subject: Subject, config: LanguageSweep) -> dict:
  """A row of `kv_pareto.json`; see its names."""
  right = language_programs.ask(pair.recall, subject.probes)
  n, size = config.context, config.batch_size
  part = subject.windows[:size, :n].astype(np.int32)
  going = pair.text.start(part, np.full(size, n, np.int32))
  logical = np.asarray(pair.text.logical(going))
  own, full = np.asarray(pair.seconds).T
  before, full_before = np.asarray(pair.prompting).T
  return {
    "method": pair.job.method,
    "keep": pair.job.keep,
    **recall_of(right, subject.probes),
    "nats_per_token": language_programs.read(pair.text, subject.windows),
    "logical_bytes": float(logical.mean()),
    "physical_bytes": pair.text.physical / size,
    "decode_ms": 1e3 * float(own.min()) / config.steps,
    "decode_speedup": float(np.median(full / own)),
    "prefill_ms": 1e3 * float(before.min()),
    "prefill_overhead": float(np.median(before / full_before)) - 1,
  }


def recall_of(right: np.ndarray, asked: Sequence[probes.Probe]) -> dict:
  """Shares of right answers: over all, by length and depth, by length.

  "recall_map" has a row for each length and a column for each depth.
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
