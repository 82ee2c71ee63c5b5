"""The command line shared by the entry points."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

from experiments.command import HELP, Command, Option
from experiments.data import DataError
from experiments.training.errors import CheckpointError, WorkdirError
from experiments.training.progress import silence
from experiments.typed import ConfigError
from tokjax.recipes import UnknownOption
from tokjax.zoo import FetchError

# What a user can change. Arguments out of range are ValueErrors everywhere.
USER_ERRORS = (
  CheckpointError,
  ConfigError,
  DataError,
  FetchError,
  FloatingPointError,
  ImportError,
  NotImplementedError,
  OSError,
  UnknownOption,
  ValueError,
  WorkdirError,
)


@contextlib.contextmanager
def one_line_errors(show_traceback: bool = False):
  """Ends the process with `error: ...` for what a user can change.

  Args:
    show_traceback: of such an error, too.
  """
  try:
    yield
  except BrokenPipeError:
    silence()
    sys.exit(128 + signal.SIGPIPE)
  except KeyboardInterrupt:
    sys.exit("error: interrupted")
  except USER_ERRORS as error:
    if show_traceback:
      traceback.print_exc()
    lines = map(str.strip, describe(error).splitlines())
    sys.exit(f"error: {' '.join(lines)}")


def describe(error: Exception) -> str:
  """What went wrong, for a person."""
  if isinstance(error, OSError) and error.filename is not None:
    return f"{error.filename}: {error.strerror}"
  return str(error) or type(error).__name__


def stop_with_parent(parent: int) -> None:
  """Saves and stops (SIGTERM) once process `parent` is no longer the parent.

  Works however the parent ends, SIGKILL included.
  """

  def watch():
    while os.getppid() == parent:
      time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=watch, daemon=True).start()


COMMON = (
  Option(
    "distributed", bool, False,
    "Several hosts that find each other (TPU pods, Slurm, Kubernetes).",
  ),
  Option("coordinator", str, None, "host:port of the first process."),
  Option("num_processes", int, None, "How many processes there are."),
  Option("process_id", int, None, "Which of them this is."),
  Option("parent", int, None, "Save and stop when this process has ended."),
  Option("traceback", bool, False, "Show where an error comes from."),
)  # fmt: skip


def workdir(default: str | None = None) -> Option:
  """The option `--workdir`; without a default it must be given."""
  return Option(
    "workdir", str, default, "Directory of the run.", default is None
  )


def join_hosts(values: Any) -> None:
  """Connects to the other processes if an option asks for it.

  Raises:
    ValueError: a coordinator without number or count of processes.
  """
  if values.coordinator is not None:
    if values.num_processes is None or values.process_id is None:
      raise ValueError("--coordinator needs --num_processes and --process_id")
    jax.distributed.initialize(
      values.coordinator, values.num_processes, values.process_id
    )
  elif values.distributed:
    jax.distributed.initialize()


def start(command: Command, main: Callable[[Any], Any]) -> None:
  """Reads the command line and calls `main` with the values of its options.

  Values have `workdir` and `traceback`; of a command with a config `config`
  and `changes`, the settings that the command line changes.
  """
  # Orbax is quiet; libraries find absl's flags at their defaults.
  logging.set_verbosity(logging.ERROR)
  flags.FLAGS.mark_as_parsed()
  words = sys.argv[1:]
  with one_line_errors("--traceback" in words):
    if any(word in HELP for word in words):
      print(command.help([word for word in words if word not in HELP]))
      sys.stdout.flush()
      return
    values = command.parse(words)
    if getattr(values, "workdir", None) == "":
      raise WorkdirError("workdir='': must name a directory")
    if getattr(values, "parent", None) is not None:
      stop_with_parent(values.parent)
    if hasattr(values, "coordinator"):
      join_hosts(values)
    main(values)
