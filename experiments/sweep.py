"""Every reduction method on one model: accuracy, cost and speed.

python -m experiments.sweep --config configs/digits_pareto.py --workdir DIR
python -m experiments.sweep --config configs/kv_pareto.py --workdir DIR

Writes `pareto.json`, `pareto.png` and `merges.png` into the workdir and prints
a table. Interrupted, it goes on where it was: rows that are there are kept.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import jax

from experiments import typed
from experiments.sweeps import language as language_subjects
from experiments.sweeps import language_sweep, merges
from experiments.sweeps import programs as programs_lib
from experiments.sweeps import results as results_lib
from experiments.sweeps.classification import SUBJECTS, Subject
from experiments.sweeps.count import Count
from experiments.sweeps.language_sweep import LanguageSweep
from experiments.sweeps.programs import Job, Program


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What is compared.

  Attributes:
    subject: the model and its held-out images; "trained" or "pretrained".
    recipes: names; empty: all of `families` that need no training.
    families: see `tokjax.recipes.names`.
    keeps: fractions of tokens that remain at the end.
    batch_size: of all programs; the one shape that is compiled.
    rounds: how often each program is timed.
    threads: that compile.
    shares: costs the table compares at, as shares of the unreduced model's;
      it is sorted by the first.
    picture_keep, pictures: keep ratio and number of images of `merges.png`.
  """

  subject: Annotated[Any, typed.OneOf(SUBJECTS)]
  recipes: tuple[str, ...] = ()
  families: tuple[str, ...] = ("baseline", "vision")
  keeps: tuple[float, ...] = (0.9, 0.7, 0.5, 0.35, 0.2)
  batch_size: int = 64
  rounds: int = 5
  threads: int = 2
  shares: tuple[float, ...] = (0.75, 0.65, 0.55)
  picture_keep: float = 0.5
  pictures: int = 6

  def __post_init__(self):
    for name in ("batch_size", "rounds", "threads", "pictures"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    for keep in self.keeps + (self.picture_keep,) + self.shares:
      if not 0 < keep <= 1:
        raise ValueError(f"keeps and shares: {keep} is not in (0, 1]")

  def methods(self) -> tuple[str, ...]:
    """Names of the recipes to compare, without "none".

    Raises:
      KeyError: an unknown recipe.
    """
    return programs_lib.methods(self.recipes, self.families, "none")


def load(config: Any) -> Sweep | LanguageSweep:
  """A sweep from a ConfigDict or mapping, of the kind its `subject` says.

  See `typed.build` for errors.
  """
  if isinstance(config, Sweep | LanguageSweep):
    return config
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  subject = config.get("subject")
  name = subject.get("name") if isinstance(subject, Mapping) else None
  kind = LanguageSweep if name in language_subjects.SUBJECTS else Sweep
  return typed.build(kind, config)


def main(config: Any, workdir: str | pathlib.Path) -> results_lib.Results:
  """Runs the sweep; everything is written under `workdir`."""
  began = time.perf_counter()
  config, workdir = load(config), pathlib.Path(workdir)
  methods = config.methods()
  workdir.mkdir(parents=True, exist_ok=True)
  if isinstance(config, LanguageSweep):
    return language_sweep.main(config, workdir)
  subject = config.subject.prepare(workdir)
  results = results_lib.Results(workdir / "pareto.json", fingerprint(config))
  rounds = list(todo(config, methods, results))
  with Count(sum(map(len, rounds)), "programs") as count:
    if rounds:
      whole = prepare_whole(config, subject, results)
    for jobs in rounds:
      run_round(config, subject, whole, jobs, results, count)

  results.draw(
    workdir / "pareto.png",
    title=f"{len(methods)} ways to reduce tokens, none trained",
    note=subject.origin,
  )
  merges.draw(
    subject, methods, config.picture_keep, config.pictures, config.threads,
    workdir / "merges.png",
  )  # fmt: skip
  results_lib.show(results, config.shares)
  print(
    f"{time.perf_counter() - began:.0f} s; {workdir}/pareto.json, pareto.png,"
    " merges.png"
  )
  return results


def fingerprint(config: Sweep) -> dict[str, Any]:
  """What rows depend on: with another value they have to be made again."""
  return {
    "subject": typed.to_dict(config)["subject"],
    "batch_size": config.batch_size,
  }


def todo(
  config: Sweep, methods: tuple[str, ...], results: results_lib.Results
) -> Iterator[list[Job]]:
  """The jobs that are left, a round for each keep ratio."""
  for keep in config.keeps:
    jobs = [Job(method, keep) for method in methods]
    jobs = [job for job in jobs if not results.has(job.method, job.keep)]
    if jobs:
      yield jobs


def prepare_whole(
  config: Sweep, subject: Subject, results: results_lib.Results
) -> Program:
  """The unreduced model's program; its row, if there is none yet."""
  images = subject.images(config.batch_size)
  whole = programs_lib.compile_one(subject, Job("none", None), shape_of(images))
  if not results.has("none", 1.0):
    total = programs_lib.answer([whole], whole, subject, config.batch_size)
    programs_lib.measure([whole], whole, caller(subject, images), config.rounds)
    results.save([{**row_of(whole, total, config), "keep": 1.0}])
  return whole


def run_round(
  config: Sweep,
  subject: Subject,
  whole: Program,
  jobs: list[Job],
  results: results_lib.Results,
  count: Count,
) -> None:
  """Compiles the jobs, then counts right answers, then times, then saves."""
  images = subject.images(config.batch_size)
  make = lambda job: programs_lib.compile_one(subject, job, shape_of(images))
  ready, unfit = programs_lib.compile_round(make, jobs, config.threads, count)
  total = programs_lib.answer(ready, whole, subject, config.batch_size)
  programs_lib.measure(ready, whole, caller(subject, images), config.rounds)
  results.save([row_of(p, total, config) for p in ready], unfit)


def caller(subject: Subject, images: Any) -> Callable[[Program], Any]:
  """What is timed of a program."""
  images, key = jax.device_put(images), jax.random.key(0)
  return lambda program: program.run(subject.params, images, key)


def shape_of(images: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of an array."""
  return jax.ShapeDtypeStruct(images.shape, images.dtype)


def row_of(program: Program, total: float, config: Sweep) -> results_lib.Row:
  """A row of `pareto.json`; GFLOPs are those of one image."""
  return {
    "method": program.job.method,
    "keep": program.job.keep,
    "tokens_per_block": list(program.tokens),
    "accuracy": program.correct / total,
    "drift": program.drift / total,
    "gflops": program.cost.flops / config.batch_size / 1e9,
    "gflops_exact": program.cost.exact,
    **programs_lib.speed(program, config.batch_size),
  }


if __name__ == "__main__":
  from experiments import launch

  launch.run(lambda config, workdir, _: main(config, workdir))
