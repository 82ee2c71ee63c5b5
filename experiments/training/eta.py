"""How long something still takes, and that something happens at all."""

import contextlib
import sys
import time

import rich.console
import rich.progress
import rich.text


class Eta:
  """The time left of a number of equal parts, from those done since `start`.

  Args:
    total: number of parts.
    start: parts that were done before.
  """

  def __init__(self, total: int, start: int = 0):
    self._total, self._start = total, start
    self._began = time.perf_counter()
    self._end: float | None = None

  def reached(self, done: int) -> None:
    """So many parts are done now."""
    now = time.perf_counter()
    each = (now - self._began) / max(done - self._start, 1)
    self._end = now + each * (self._total - done)

  def __str__(self) -> str:
    if self._end is None:
      return "ETA -:--:--"
    left = max(int(self._end - time.perf_counter()), 0)
    return f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


class EtaColumn(rich.progress.ProgressColumn):
  """An `Eta` that counts down; rich's own forgets after 30 seconds."""

  max_refresh = 0.5

  def __init__(self, eta: Eta):
    super().__init__()
    self._eta = eta

  def render(self, task: rich.progress.Task) -> rich.text.Text:
    del task
    return rich.text.Text(str(self._eta), style="progress.remaining")


@contextlib.contextmanager
def working(text: str, stream=None):
  """On a terminal a line that moves; nothing elsewhere.

  Args:
    text: what is done.
    stream: where; None: standard output.
  """
  stream = sys.stdout if stream is None else stream
  if not stream.isatty():
    yield
    return
  p = rich.progress
  with p.Progress(
    p.SpinnerColumn(), p.TextColumn("{task.description}"),
    p.TimeElapsedColumn(), console=rich.console.Console(file=stream),
    transient=True,
  ) as bar:  # fmt: skip
    bar.add_task(text, total=None)
    yield
