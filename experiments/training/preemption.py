"""SIGTERM, SIGINT and SIGHUP mean: save now, then stop in good order."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preemption:
  """A context in which these signals are a request to save and stop.

  A second SIGINT interrupts at once. A signal that is ignored when the context
  begins (SIGHUP under `nohup`) stays ignored.

  With several processes the distributed runtime listens for SIGTERM, and all
  processes learn of it at the same step; the other signals are passed on to it
  as that.

  Attributes:
    name: of the signal that came, "SIGTERM" until one has.
  """

  def __init__(self):
    self.name = signal.SIGTERM.name
    self._asked = False
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self
    alone = jax.process_count() == 1
    for number in SIGNALS if alone else SIGNALS[1:]:
      if signal.getsignal(number) != signal.SIG_IGN:
        handler = self._ask if alone else self._pass_on
        self._before[number] = signal.signal(number, handler)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number: int, _):
    self._asked, self.name = True, signal.Signals(number).name
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)

  def _pass_on(self, *_):
    os.kill(os.getpid(), signal.SIGTERM)

  def reached(self, step: int) -> bool:
    """Whether to save and stop; every process must ask at every step."""
    if jax.process_count() == 1:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)
