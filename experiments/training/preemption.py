"""SIGTERM means: save now, then leave in good order."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
  """A context in which SIGTERM is a request instead of an end.

  With several processes the distributed runtime listens for the signal, and
  all processes learn of it at the same step.
  """

  def __init__(self):
    self._asked = False
    self._before = None

  def __enter__(self):
    alone = jax.process_count() == 1
    if alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _ask(self, *_):
    self._asked = True

  def reached(self, step: int) -> bool:
    """Whether to save and stop; every process must ask at every step."""
    if jax.process_count() == 1:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)
