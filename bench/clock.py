"""Seconds of calls whose work goes on after they have returned."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax


class Unavailable(Exception):
  """Something cannot run here; the message says why."""


class Timed(Protocol):
  """`run()` starts the work, `wait(result)` blocks until a result is there."""

  run: Callable[[], Any]
  wait: Callable[[Any], Any]


class Call(NamedTuple):
  """A function without arguments that starts work on a device."""

  run: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready


def seconds(candidate: Timed, calls: int) -> float:
  """Of one of several calls in a row."""
  began = time.perf_counter()
  for _ in range(calls):
    result = candidate.run()
  candidate.wait(result)
  return (time.perf_counter() - began) / calls


def in_turns(
  found: Sequence[Timed], rounds: int, at_least: float
) -> list[list[float]]:
  """Seconds of a call of each candidate in each round, after two to warm up.

  Args:
    found: what is timed; all take turns, so that a busy machine hits all alike.
    rounds: how often each is timed.
    at_least: seconds that each takes in all rounds together: short calls are
      repeated within a round.
  """
  calls = []
  for candidate in found:
    candidate.wait(candidate.run())
    spent = seconds(candidate, 1)
    calls.append(max(1, round(at_least / rounds / max(spent, 1e-6))))
  timings: list[list[float]] = [[] for _ in found]
  for _ in range(rounds):
    for timing, candidate, n in zip(timings, found, calls, strict=True):
      timing.append(seconds(candidate, n))
  return timings
