"""Shares out the time that is left."""

import time
from collections.abc import Callable, Sequence

from scripts.report.stages import Stage

# For what happens after the last stage.
_RESERVE = 3.0


class Budget:
  """The time of a whole run.

  Args:
    minutes: of all stages together.
    now: a clock, in seconds.
  """

  def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic):
    self._now = now
    self._ends = now() + 60 * minutes - _RESERVE

  def left(self) -> float:
    """Seconds, at least 0."""
    return max(0.0, self._ends - self._now())

  def share(self, groups: Sequence[Sequence[Stage]]) -> float:
    """Seconds for the first of the groups that remain, by weight.

    Stages of a group run at the same time. What one does not use, the later
    ones have.
    """
    weights = [max(stage.weight for stage in group) for group in groups]
    return self.left() * weights[0] / sum(weights)
