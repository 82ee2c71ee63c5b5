"""The command line shared by the entry points."""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

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
    sys.exit(f"error: {describe(error)}")


def describe(error: Exception) -> str:
  """What went wrong, for a person."""
  if isinstance(error, OSError) and error.filename is not None:
    return f"{error.filename}: {error.strerror}"
  if isinstance(error, OSError):
    # config_flags lists what it tried; the last is the path as it was given.
    return str(error).strip().splitlines()[-1].strip()
  if isinstance(error, (AttributeError, KeyError)) and error.args:
    return str(error.args[0])
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


def _common(workdir: str | None = None) -> Any:
  """Flags of every command; without a default, `workdir` must be given."""
  flags.DEFINE_string("workdir", workdir, "directory of the run")
  flags.DEFINE_bool(
    "distributed", False,
    "several hosts that find each other (TPU pods, Slurm, Kubernetes)",
  )  # fmt: skip
  flags.DEFINE_string("coordinator", None, "host:port of the first process")
  flags.DEFINE_integer("num_processes", None, "how many processes there are")
  flags.DEFINE_integer("process_id", None, "which of them this is")
  flags.DEFINE_integer("parent", None, "stop when this process has ended")
  flags.DEFINE_bool("traceback", False, "show where an error comes from")
  if workdir is None:
    flags.mark_flag_as_required("workdir")
  return flags.FLAGS


def join_hosts(values: Any) -> None:
  """Connects to the other processes if a flag asks for it; quietens orbax.

  Raises:
    ValueError: a coordinator without number or count of processes.
  """
  logging.set_verbosity(logging.ERROR)
  if values.coordinator is not None:
    if values.num_processes is None or values.process_id is None:
      raise ValueError("--coordinator needs --num_processes and --process_id")
    jax.distributed.initialize(
      values.coordinator, values.num_processes, values.process_id
    )
  elif values.distributed:
    jax.distributed.initialize()


def _parse(argv: Sequence[str]) -> Sequence[str]:
  """Parses flags; builds the config, which is a program of the user's."""
  try:
    rest = flags.FLAGS(list(argv))
    if rest[1:]:
      raise flags.Error(f"unexpected argument {rest[1]!r}")
    return rest
  except Exception as error:
    sys.exit(f"error: {_unparsed(error)}")


def _unparsed(error: Exception) -> str:
  """Why flags or the config they name cannot be used, in one line."""
  # config_flags puts a traceback, or a list of attempts, into its message.
  while "\n" in str(error) and error.__context__ is not None:
    error = error.__context__
  text = " ".join(describe(error).split())
  if isinstance(error, (flags.Error, OSError, ConfigError)):
    return text
  frame = traceback.extract_tb(error.__traceback__)[-1]
  if "ml_collections" in frame.filename:
    if not isinstance(error, (AttributeError, KeyError)):
      return text
    # Its message is a string with quotes and line ends written out.
    text = text.replace("\\n", " ").replace("\\'", "'").strip("'")
    return f"--config: no entry '{text}"
  if isinstance(error, ValueError):
    return text
  kind = type(error).__name__
  if isinstance(error, SyntaxError):
    return f"{kind}: {text}"
  return f"{frame.filename}, line {frame.lineno}: {kind}: {text}"


def _start(values: Any, main: Callable[[], Any]) -> None:
  """Parses flags and runs `main`."""

  def start(_):
    with one_line_errors(values.traceback):
      if not values.workdir:
        raise WorkdirError("workdir='': must name a directory")
      if values.parent is not None:
        stop_with_parent(values.parent)
      join_hosts(values)
      main()

  app.run(start, flags_parser=_parse)


def run(main: Callable[[Any, str, Any], Any]) -> None:
  """`main(config, workdir, flags)` with `--config FILE.py[:arg]`.

  Values of the config can be set: `--config.optimizer.lr=1e-3`.
  """
  config = config_flags.DEFINE_config_file("config", None, lock_config=True)
  flags.DEFINE_string("profile", None, "FIRST:LAST steps to trace")
  flags.mark_flag_as_required("config")
  values = _common()
  _start(values, lambda: main(config.value, values.workdir, values))


def generate(main: Callable[..., Any]) -> None:
  """`main(config, workdir, prompt, ...)`; models are in the user's cache."""
  default = pathlib.Path(__file__).parents[1] / "configs" / "generate.py"
  config = config_flags.DEFINE_config_file(
    "config", str(default), lock_config=True
  )
  flags.DEFINE_string("prompt", None, "text to continue")
  flags.DEFINE_string("prompts", None, "file of prompts, text or .jsonl")
  flags.DEFINE_string("model", None, "of `tokjax models`, or a checkpoint")
  flags.DEFINE_bool("yes", False, "the model may be downloaded")
  flags.DEFINE_bool("chat", False, "the prompt is a user's message")
  flags.DEFINE_multi_string("stop", [], "end the text at this string")
  flags.DEFINE_bool("json", False, "print one line of JSON for each prompt")
  values = _common(str(pathlib.Path.home() / ".cache/tokjax/generate"))

  def start():
    chosen = config.value
    if values.chat:
      chosen.chat = True
    if values.stop:
      chosen.stop = tuple(values.stop)
    main(
      chosen,
      values.workdir,
      values.prompt,
      prompts=values.prompts,
      model=values.model,
      yes=values.yes,
      as_json=values.json,
    )

  _start(values, start)


def evaluate(main: Callable[..., Any]) -> None:
  """`main(workdir, recipe, keep)`."""
  flags.DEFINE_string("recipe", None, "fill the slots with this recipe")
  flags.DEFINE_float("keep", None, "fraction of tokens that remain")
  values = _common()
  _start(values, lambda: main(values.workdir, values.recipe, values.keep))
