"""Where the weights of a run come from, and what their classes are called."""

import pathlib

from experiments.data.images import FolderImages
from experiments.training import checkpoints, published
from experiments.training import config as config_lib
from experiments.training.errors import CheckpointError
from tokjax import interop


def last(workdir: str | pathlib.Path) -> tuple[checkpoints.Checkpoints, int]:
  """The checkpoints of a run, and the step of the last.

  Raises:
    CheckpointError: there is none.
  """
  saved = checkpoints.Checkpoints(pathlib.Path(workdir), read_only=True)
  step = saved.latest()
  if step is None:
    raise CheckpointError(f"{workdir}: has no checkpoint")
  return saved, step


def run_config(workdir: str | pathlib.Path) -> config_lib.Config:
  """The config that the last checkpoint of a run was written with."""
  saved, step = last(workdir)
  found = config_lib.load(saved.config(step))
  saved.close()
  return found


def source_of(config: config_lib.Config) -> str | None:
  """The published checkpoint that a run started from, through other runs.

  Raises:
    CheckpointError: one of these runs is no longer there.
  """
  seen = set()
  while config.init is not None and config.init not in seen:
    if not published.is_run(config.init):
      return config.init
    seen.add(config.init)
    config = run_config(config.init)
  return None


def labels(
  config: config_lib.Config, source: str | pathlib.Path | None
) -> tuple[str, ...]:
  """Names of a run's classes; (): nobody named them.

  Args:
    config: of the run.
    source: the checkpoint that it started from, whose names hold unless the
      run has a head of its own.
  """
  classes, found = getattr(config.model, "num_classes", None), ()
  own = isinstance(config.data, FolderImages)
  if source is not None and config.fresh is None:
    if not own or config.data.match == "order":
      found = interop.labels_of(source)
  if own and not found:
    found = config.data.classes
  return tuple(found) if len(found) == classes else ()
