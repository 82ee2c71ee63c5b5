"""Recipes as compiled programs: built in threads, counted, timed.

XLA compiles without holding the interpreter's lock, so that a few threads
build programs in parallel. Each program has one batch shape and is compiled
once; accuracy, cost and speed are those of this one program.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweeps.classification import Subject
from experiments.sweeps.count import Count
from tokjax import recipes
from tokjax.analysis import cost
from tokjax.budgets import BudgetError
from tokjax.slots import Slots

Made = TypeVar("Made")


def methods(
  names: tuple[str, ...], families: tuple[str, ...], whole: str
) -> tuple[str, ...]:
  """Names of the recipes that a sweep compares.

  Args:
    names: those asked for; empty: all of `families` that need no training.
    families: see `tokjax.recipes.names`.
    whole: the recipe that all are compared with, left out of the families.

  Raises:
    KeyError: an unknown recipe.
  """
  if names:
    return tuple(recipes.find(name).name for name in names)
  return tuple(
    name
    for family in families
    for name in recipes.names(family)
    if recipes.find(name).training != "learned" and name != whole
  )


@dataclasses.dataclass(frozen=True)
class Job:
  """A recipe at a keep ratio; None: its own schedule.

  Attributes:
    method, keep: see `tokjax.recipes.get`.
    options: other options of the recipe, names and values.
  """

  method: str
  keep: float | None
  options: tuple[tuple[str, Any], ...] = ()

  def slots(self) -> Slots:
    keep = {} if self.keep is None else {"keep": self.keep}
    return recipes.get(self.method, **keep, **dict(self.options))


@dataclasses.dataclass
class Program:
  """A compiled forward pass.

  Attributes:
    job: what was compiled.
    run: `run(params, images, key) -> log-probabilities [b, classes]`.
    tokens: tokens in each block behind its reduction, protected ones included.
    cost: of a batch, selection included, by the compiler's own analysis.
    correct, drift: sums over images: right answers, and divergence from the
      unreduced model's answer (Kullback-Leibler, nats).
    seconds: times of this program and of the unreduced one next to it.
  """

  job: Job
  run: Any
  tokens: tuple[int, ...]
  cost: cost.Cost
  correct: float = 0.0
  drift: float = 0.0
  seconds: list[tuple[float, float]] = dataclasses.field(default_factory=list)


class Unfit(ValueError):
  """A recipe that this model cannot be built with, and why."""

  def __init__(self, job: Job, reason: str):
    super().__init__(f"{job.method} at keep={job.keep}: {reason}")
    self.job, self.reason = job, reason


def compile_one(
  subject: Subject, job: Job, images: jax.ShapeDtypeStruct
) -> Program:
  """Builds the model with the recipe and compiles its forward pass.

  Raises:
    Unfit: the keep ratio cannot be reached, or a signal is missing.
  """
  key = jax.random.key(0)
  try:
    slots = job.slots()
    model = subject.build(slots)
    tokens = tokens_per_block(subject, slots, images, key)
  except (BudgetError, ValueError) as error:
    raise Unfit(job, str(error)) from error

  @jax.jit
  def forward(params, images, key):
    logits, _ = model.apply({"params": params}, images, key=key)
    return jax.nn.log_softmax(logits.astype(jnp.float32))

  arguments = (subject.params, images, key)
  compiled = forward.lower(*arguments).compile()
  spent = cost.measure(forward, *arguments, compiled=compiled)
  return Program(job, compiled, tokens, spent)


def compile_all(
  make: Callable[[Job], Made], jobs: Iterable[Job], threads: int
) -> Iterator[Made | Unfit]:
  """What `make` compiles of each job, in the order in which it is ready."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    futures = [pool.submit(make, job) for job in jobs]
    try:
      for future in concurrent.futures.as_completed(futures):
        try:
          yield future.result()
        except Unfit as unfit:
          yield unfit
    finally:
      for future in futures:
        future.cancel()


def compile_round(
  make: Callable[[Job], Made], jobs: list[Job], threads: int, count: Count
) -> tuple[list[Made], list[dict[str, Any]]]:
  """What could be compiled, in the order of the jobs, and rows of the rest."""
  ready, unfit = [], []
  for outcome in compile_all(make, jobs, threads):
    job = outcome.job
    if isinstance(outcome, Unfit):
      row = {"method": job.method, "keep": job.keep, "reason": outcome.reason}
      unfit.append(row)
    else:
      ready.append(outcome)
    count.step(f"{job.method} at {job.keep}")
  return sorted(ready, key=lambda made: jobs.index(made.job)), unfit


def tokens_per_block(
  subject: Subject, slots: Slots, images: jax.ShapeDtypeStruct, key: jax.Array
) -> tuple[int, ...]:
  """Tokens in each block behind its reduction, protected ones included.

  Where a method gives its tokens back within the block, those in between.
  """
  depth, front = subject.model.depth, len(subject.model.kinds)
  left = subject.model.num_patches
  if slots.program is not None:
    model = subject.build(slots)
    forward = lambda p, x: model.apply({"params": p}, x, key=key)[1]["tokens"]
    left = jax.eval_shape(forward, subject.params, images).num_tokens - front
  tables = slots.counts(left, depth)
  out = []
  for block in range(depth):
    inside = left
    for reduce, table in zip(slots.reduce, tables, strict=True):
      if table[block] is None:
        continue
      inside = min(inside, table[block])
      if not reduce.around:
        left = inside
    out.append(inside + front)
  return tuple(out)


def answer(
  programs: Iterable[Program],
  whole: Program,
  subject: Subject,
  size: int,
) -> float:
  """Adds answers to every program; returns the number of images.

  The data is read once for all programs; random recipes draw the same keys
  in every run.
  """
  programs, total = list(programs), 0.0
  for i, batch in enumerate(subject.batches(size)):
    inputs = (subject.params, jnp.asarray(batch["image"]), jax.random.key(i))
    label, weight = batch["label"], batch["weight"]
    meant = np.asarray(whole.run(*inputs))
    for program in programs:
      said = np.asarray(program.run(*inputs))
      drift = (np.exp(meant) * (meant - said)).sum(axis=-1)
      program.correct += float(((said.argmax(-1) == label) * weight).sum())
      program.drift += float((drift * weight).sum())
    total += float(weight.sum())
  return total


def measure(
  programs: list[Made],
  whole: Made,
  call: Callable[[Made], Any],
  rounds: int,
) -> None:
  """Times programs in turn, each next to the unreduced model.

  Taking turns, and comparing neighbours, keeps what else the machine does
  from favouring one of them. Nothing compiles meanwhile.

  Args:
    programs, whole: have a list `seconds`, which pairs are added to.
    call: runs a program.
    rounds: how often.
  """

  def seconds(program: Made) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(program))
    return time.perf_counter() - start

  seconds(whole)
  for _ in range(rounds):
    for program in programs:
      program.seconds.append((seconds(program), seconds(whole)))


def speed(program: Program, batch: int) -> dict[str, float]:
  """Images per second by the best round, speed-up by the median of ratios."""
  own, whole = np.asarray(program.seconds).T
  return {
    "images_per_second": batch / own.min(),
    "images_per_second_median": batch / np.median(own),
    "speedup": float(np.median(whole / own)),
  }
