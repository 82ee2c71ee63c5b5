"""Compiling many programs in threads, and timing them in turns.

XLA compiles without holding the interpreter's lock, so that a few threads
build programs in parallel. Each program has one batch shape and is compiled
once; accuracy, cost and speed are those of this one program.
"""

import concurrent.futures
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.sweeps.count import Count
from experiments.sweeps.results import Row
from experiments.sweeps.subject import Job, P, Unfit


def compile_all(
  make: Callable[[Job], P], jobs: Sequence[Job], threads: int
) -> Iterator[P | Unfit]:
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
  make: Callable[[Job], P],
  jobs: Sequence[Job],
  threads: int,
  count: Count,
  share: float,
) -> tuple[list[P], list[Row]]:
  """What could be compiled, in the order of the jobs, and rows of the rest.

  Args:
    make, jobs, threads: see `compile_all`.
    count: told of every job that is compiled.
    share: of a job that compiling is.
  """
  ready, unfit = [], []
  for outcome in compile_all(make, jobs, threads):
    job = outcome.job
    if isinstance(outcome, Unfit):
      row = {"method": job.method, "keep": job.keep, "reason": outcome.reason}
      unfit.append(row)
    else:
      ready.append(outcome)
    count.step(f"compiled {job.method} at {job.keep}", share)
  return sorted(ready, key=lambda made: jobs.index(made.job)), unfit


def measure(
  programs: Sequence[P],
  whole: P,
  calls: Callable[[P], Mapping[str, Callable[[], Any]]],
  rounds: int,
) -> list[dict[str, np.ndarray]]:
  """Times programs in turn, each next to the unreduced model.

  Programs take turns and are compared with their neighbour in time, so that
  what else the machine does favours none of them. Nothing compiles meanwhile.

  Args:
    programs, whole: see `Subject.calls`, which is `calls`.
    rounds: how often.

  Returns:
    For each program and each of its calls, seconds of the program and of the
    unreduced model, `[rounds, 2]`.
  """
  own, others = [calls(program) for program in programs], calls(whole)
  out: list[dict[str, Any]] = [{name: [] for name in others} for _ in own]
  for name, other in others.items():
    _seconds(other)
    for _ in range(rounds):
      for mine, found in zip(own, out, strict=True):
        found[name].append((_seconds(mine[name]), _seconds(other)))
  return [{k: np.asarray(v) for k, v in found.items()} for found in out]


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def speedup(seconds: np.ndarray) -> float:
  """Median over rounds of how many times faster than the unreduced model.

  Args:
    seconds: see `measure`.
  """
  own, whole = seconds.T
  return float(np.median(whole / own))
