"""Progress through a number of jobs: a bar on a terminal, lines otherwise."""

import sys

from experiments.training.eta import Eta, bar


class Count:
  """Counts jobs and says how long the rest will take.

  with Count(3, "programs") as count:
    count.step("what was done")
  """

  def __init__(self, total: int, unit: str):
    self._total, self._unit, self._done = total, unit, 0
    self._eta = Eta(total)
    self._bar = None

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

  def step(self, text: str) -> None:
    """One more job is done."""
    self._done += 1
    self._eta.reached(self._done)
    if self._bar is not None:
      self._bar.update(self._task, advance=1, description=text)
      return
    print(
      f"{self._unit} {self._done}/{self._total}  {self._eta.spent:.0f} s"
      f"  ETA {self._eta.left:.0f} s  {text}",
      flush=True,
    )
