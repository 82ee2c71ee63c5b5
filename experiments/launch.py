"""The command line shared by the entry points."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.data import DataError
from experiments.training.checkpoints import CheckpointError
from experiments.typed import ConfigError

MENDABLE = (
  CheckpointError,
  ConfigError,
  DataError,
  FileNotFoundError,
  FloatingPointError,
)


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


def _start(
  values: Any,
  main: Callable[[], Any],
  mendable: tuple[type[Exception], ...] = MENDABLE,
) -> None:
  """Runs `main`; what the user can mend is one message, not a traceback."""

  def start(_):
    try:
      join_hosts(values)
      main()
    except mendable as error:
      sys.exit(f"error: {error}")

  app.run(start)


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
  """`main(config, workdir, prompt)`; models are kept in the user's cache."""
  config = config_flags.DEFINE_config_file("config", None, lock_config=True)
  flags.DEFINE_string("prompt", None, "text to continue")
  flags.mark_flag_as_required("config")
  values = _common(str(pathlib.Path.home() / ".cache/tokjax/generate"))
  # A prompt, a recipe or a checkpoint that cannot be: all say what to change.
  _start(
    values,
    lambda: main(config.value, values.workdir, values.prompt),
    (*MENDABLE, ValueError),
  )


def evaluate(main: Callable[..., Any]) -> None:
  """`main(workdir, recipe, keep)`."""
  flags.DEFINE_string("recipe", None, "fill the slots with this recipe")
  flags.DEFINE_float("keep", None, "fraction of tokens that remain")
  values = _common()
  _start(values, lambda: main(values.workdir, values.recipe, values.keep))
