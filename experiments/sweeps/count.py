"""Progress through a number of jobs: a bar on a terminal, lines otherwise."""

import sys
import time
from collections.abc import Callable

from experiments.training.eta import Eta, bar

# Seconds between two lines about parts of a job.
BETWEEN = 15.0

Told = Callable[[int, int], None]


class Count:
  """Counts jobs and says how long the rest will take.

  with Count(3, "programs") as count:
    count.step("what was done")

  Where there is no terminal a line is printed for each job, and for parts of
  one at most every 15 seconds.
  """

  def __init__(self, total: int, unit: str):
    self._total, self._unit, self._done = total, unit, 0.0
    self._eta = Eta(total)
    self._bar = None
    self._printed = time.perf_counter()

  def __enter__(self) -> "Count":
    self._eta = Eta(self._total)
    if self._total and sys.stdout.isatty():
      self._bar = bar(self._eta, self._unit)
      self._task = self._bar.add_task("", total=self._total)
      self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    if self._bar is not None:
      self._bar.stop()

  def step(self, text: str, jobs: float = 1) -> None:
    """One more job is done, or several, or a part of one."""
    self.reached(self._done + jobs, text)

  def within(self, jobs: float, text: str) -> Told:
    """What is to be told how many parts of the next jobs are done.

    Args:
      jobs: how many jobs all parts are, or which share of one.
      text: what they are.

    Returns:
      A function of the number of parts that are done and of all parts.
    """
    begin = self._done

    def told(done: int, total: int) -> None:
      self.reached(
        begin + jobs * done / total,
        f"{text}, {done} of {total}",
        every=BETWEEN,
      )

    return told

  def reached(self, done: float, text: str, every: float = 0.0) -> None:
    """So many jobs are done; a line within `every` seconds is left out."""
    self._done = done
    self._eta.reached(done)
    if self._bar is not None:
      self._bar.update(self._task, completed=done, description=text)
      return
    if (now := time.perf_counter()) - self._printed < every:
      return
    self._printed = now
    print(
      f"{self._unit} {done:.3g}/{self._total}  {self._eta.spent:.0f} s"
      f"  ETA {self._eta.left:.0f} s  {text}",
      flush=True,
    )
