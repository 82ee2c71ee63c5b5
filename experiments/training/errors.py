"""What can go wrong with the directory of a run, as errors with one message."""

import contextlib
import errno
import pathlib
import shutil

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
  """Something saved cannot be written or read; the message says which."""


class WorkdirError(RuntimeError):
  """A directory that cannot be used for a run; the message says why."""


@contextlib.contextmanager
def disk_errors(workdir: pathlib.Path):
  """A full disk is a CheckpointError, wherever it is noticed first."""
  try:
    yield
  except OSError as error:
    if error.errno not in FULL:
      raise
    raise not_written(workdir, "the run", error) from error


@contextlib.contextmanager
def writing(directory: pathlib.Path, what: str):
  """Turns what orbax raises while it writes `what` into a CheckpointError."""
  try:
    yield
  except Exception as error:
    raise not_written(directory, what, error) from error


def not_written(
  directory: pathlib.Path, what: str, error: Exception
) -> CheckpointError:
  """The error for `what` could not be written; says how much space there is."""
  free = shutil.disk_usage(directory).free / 2**20
  return CheckpointError(
    f"{directory}: {what} could not be written; {free:.1f} MiB are free there."
    " Older checkpoints are as they were; make room and start again."
    f" ({first_line(error)})"
  )


def first_line(error: Exception) -> str:
  """Type and message of an error, cut to what fits into another message."""
  text = str(error).splitlines()[0][:300] if str(error) else ""
  return f"{type(error).__name__}: {text}"
