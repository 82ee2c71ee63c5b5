"""A trace of some steps, by flag."""

import contextlib
import pathlib

import jax


class Profile:
  """Captures the steps `"first:last"` under `workdir/profile`; None: none.

  Raises:
    ValueError: another form of window.
  """

  def __init__(self, window: str | None, workdir: pathlib.Path):
    self._directory = workdir / "profile"
    self._first = self._last = None
    self._open = False
    if window is None:
      return
    first, _, last = window.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
      raise ValueError(f"profile={window!r}: must be FIRST:LAST, say 10:15")
    self._first, self._last = int(first), int(last)

  @contextlib.contextmanager
  def step(self, step: int):
    """Around a step; its name is in the trace."""
    if self._first is None:
      yield
      return
    if step == self._first:
      jax.profiler.start_trace(str(self._directory))
      self._open = True
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield
    if step == self._last:
      self.close()

  def close(self) -> None:
    if self._open:
      jax.profiler.stop_trace()
    self._open = False
