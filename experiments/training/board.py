"""TensorBoard's event file, written at once.

tensorboardX's own writer passes events to a thread. When that thread fails,
on a full disk, the next events wait for it without end.
"""

import pathlib
import time
from collections.abc import Mapping


class Board:
  """One event file for scalars of a launch.

  Args:
    folder: is created.
    first: TensorBoard hides what earlier launches wrote from this step on.
  """

  def __init__(self, folder: pathlib.Path, first: int):
    # Not above: tensorboardX imports torch where that is installed, and most
    # commands write no board.
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    self._scalar, self._event = summary.scalar, event_pb2.Event
    folder.mkdir(parents=True, exist_ok=True)
    # By nanoseconds: its own name for every launch, also in one second.
    self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=first, file_version="brain.Event:2")
    self._write(step=first, session_log=start)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Scalars of a step, by name."""
    for name, value in values.items():
      self._write(step=step, summary=self._scalar(name, value))
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, **event) -> None:
    self._file.write_event(self._event(wall_time=time.time(), **event))
