"""How long something still takes, and that something happens at all."""

import contextlib
import sys
import time

import rich.console
import rich.progress
import rich.table
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

  def reached(self, done: float) -> None:
    """So many parts are done now; not all need be whole."""
    now, new = time.perf_counter(), done - self._start
    each = self.spent / (new if new > 0 else 1)
    self._end = now + each * (self._total - done)

  @property
  def spent(self) -> float:
    """Seconds since this was made."""
    return time.perf_counter() - self._began

  @property
  def left(self) -> float | None:
    """Seconds until the end; None: nothing is done yet."""
    if self._end is None:
      return None
    return max(self._end - time.perf_counter(), 0.0)

  def __str__(self) -> str:
    if self.left is None:
      return "ETA -:--:--"
    left = int(self.left)
    return f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


class EtaColumn(rich.progress.ProgressColumn):
  """An `Eta` that counts down; rich's own forgets after 30 seconds."""

  max_refresh = 0.5

  def __init__(self, eta: Eta):
    super().__init__(whole())
    self._eta = eta

  def render(self, task: rich.progress.Task) -> rich.text.Text:
    del task
    return rich.text.Text(str(self._eta), style="progress.remaining")


class ShortColumn(rich.progress.ProgressColumn):
  """The description, cut where the terminal ends; nothing else is."""

  def render(self, task: rich.progress.Task) -> rich.text.Text:
    return rich.text.Text(task.description, no_wrap=True, overflow="ellipsis")


def whole() -> rich.table.Column:
  """A column that is never cut or wrapped."""
  return rich.table.Column(no_wrap=True)


def bar(eta: Eta, unit: str = "") -> rich.progress.Progress:
  """Parts done, a bar, time and time left, then a description."""
  p = rich.progress
  return p.Progress(
    *([p.TextColumn(unit)] if unit else []),
    p.MofNCompleteColumn(table_column=whole()),
    p.BarColumn(10, table_column=whole()),
    p.TimeElapsedColumn(whole()), EtaColumn(eta), ShortColumn(),
    console=rich.console.Console(file=sys.stdout),
  )  # fmt: skip


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
  ) as spinner:  # fmt: skip
    spinner.add_task(text, total=None)
    yield
