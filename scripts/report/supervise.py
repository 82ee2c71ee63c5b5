"""Runs stages in processes of their own, and goes on when they fail or hang."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from scripts.report.stages import Stage

ROOT = pathlib.Path(__file__).resolve().parents[2]
_POLL = 0.05
# For a process to import JAX, find the device and say which rows there are.
_START_SECONDS = 90.0
# Memory of a device is taken as it is needed: the process before may still
# hold some, and PyTorch wants some too.
SETTINGS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

Keep = Callable[[dict[str, Any]], None]

_running: set["Worker"] = set()
_stopping = threading.Event()


def end_all() -> None:
  """Ends what runs; for a command that is being ended itself."""
  _stopping.set()
  for worker in list(_running):
    worker.end()


class Worker:
  """A process that measures rows from number `first` on.

  Attributes:
    names: of all rows of the stage, once it has told them.
    device: what it runs on, likewise.
    row: number of the row under way, or None.
    first: number of the first row that is not measured yet.
  """

  def __init__(
    self, stage: Stage, first: int, wrong: Sequence[str], folder: pathlib.Path
  ):
    self.names: list[str] = []
    self.device: dict[str, Any] | None = None
    self.row: int | None = None
    self.first = first
    self._journal = folder / f"{stage.name.replace(' ', '_')}_{first}.journal"
    self._journal.write_text("")
    self._read, self._since = 0, time.monotonic()
    self._failed: str | None = None
    command = [
      sys.executable, "-m", "scripts.report.worker", stage.jobs,
      json.dumps(dict(stage.options)), str(self._journal), str(first),
      json.dumps(list(wrong)),
    ]  # fmt: skip
    with open(folder / "log.txt", "a") as log:
      log.write(f"== {stage.name}, from row {first}\n")
      log.flush()
      self._process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        process_group=0, env=environment(),
      )  # fmt: skip
    _running.add(self)

  def follow(self, stage: Stage, ends: float, keep: Keep) -> str | None:
    """Waits for the end; returns None, or what went wrong."""
    while True:
      status = self._process.poll()
      self._hear(keep)
      if status == 0 or self.names and self.first >= len(self.names):
        return None
      if status is not None:
        return self._failed or died(status)
      now = time.monotonic()
      most = _START_SECONDS if self.row is None else stage.row_seconds
      if now - self._since > most:
        return f"ended after {most:g} s, the limit of one row"
      if now > ends:
        return f"ended after {now - self._since:.0f} s: the stage's time was up"
      time.sleep(_POLL)

  def _hear(self, keep: Keep) -> None:
    """Takes the lines that are whole by now."""
    with open(self._journal, "rb") as file:
      file.seek(self._read)
      lines = file.read().split(b"\n")
    for line in lines[:-1]:
      self._read += len(line) + 1
      said = json.loads(line)
      self._failed = said.get("failed")
      if "names" in said:
        self.names, self.device = said["names"], said["device"]
      if "begun" in said:
        self.row, self._since = said["begun"], time.monotonic()
      if "row" in said:
        keep(said["row"])
        self.first, self.row = self.row + 1, None
        self._since = time.monotonic()

  def end(self) -> None:
    """Ends the process and those that it started."""
    _running.discard(self)
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    try:
      self._process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      pass  # It hangs in the driver; the next stage has a process of its own.
    self._journal.unlink(missing_ok=True)


def environment() -> dict[str, str]:
  """What a worker finds set."""
  found = {**SETTINGS, **os.environ}
  path = (str(ROOT), found.get("PYTHONPATH"))
  found["PYTHONPATH"] = os.pathsep.join(filter(None, path))
  platforms = found.get("JAX_PLATFORMS")
  if platforms and "cpu" not in platforms.split(","):
    # Exact results are computed there.
    found["JAX_PLATFORMS"] = f"{platforms},cpu"
  return found


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a stage ended.

  Attributes:
    status: "done", or why rows are missing.
    device: what the last worker ran on; None: none has told.
  """

  status: str
  device: dict[str, Any] | None


def run(
  stage: Stage,
  seconds: float,
  wrong: Sequence[str],
  keep: Keep,
  folder: pathlib.Path,
) -> Outcome:
  """Measures a stage.

  A row of which the process dies, or that takes too long, costs that row: the
  stage goes on behind it in a new process.

  Args:
    stage: what is measured.
    seconds: that it may take.
    wrong: names of checks that went wrong.
    keep: called with each row as soon as it is there.
    folder: where the log goes.
  """
  ends = time.monotonic() + seconds
  first, device, failed_starts = 0, None, 0
  while True:
    worker = Worker(stage, first, wrong, folder)
    try:
      trouble = worker.follow(stage, ends, keep)
    finally:
      worker.end()
    device = worker.device or device
    if trouble is None:
      return Outcome("done", device)
    if _stopping.is_set():
      return Outcome("the command was ended", device)
    late = time.monotonic() > ends
    if worker.row is not None:
      kind = "skipped" if late else "error"
      keep({"name": worker.names[worker.row], kind: trouble})
      worker.first = worker.row + 1
    elif worker.first == first:
      failed_starts += 1
    first, left = worker.first, len(worker.names) - worker.first
    if worker.names and left == 0:
      return Outcome("the last row was cut" if late else "done", device)
    if failed_starts > 1 or (late and not worker.names):
      return Outcome(f"it did not start: {trouble}; see log.txt", device)
    if late:
      return Outcome(f"{left} rows not begun: the time was up", device)


def died(status: int) -> str:
  """What an exit status says."""
  if status > 0:
    return f"the process ended with status {status}"
  return f"the process died of {signal.Signals(-status).name}"
