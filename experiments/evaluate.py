"""Evaluation of a run, on any mesh.

python -m experiments.evaluate --workdir DIR
python -m experiments.evaluate --workdir DIR --recipe tome --keep 0.5
python -m experiments.evaluate --workdir DIR --config.eval_batch_size=64
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import ml_collections

from experiments import settings, typed
from experiments.data import DATA, pipeline
from experiments.tasks import TASKS
from experiments.training import checkpoints
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training.errors import CheckpointError
from experiments.typed import ConfigError
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What may differ from the run; what is not given is as the run has it.

  Attributes:
    data: where the held-out examples come from.
    task: what is computed from them.
    recipe: fills the slots.
    mesh: of the devices that are here; not given: all, as copies.
    eval_batch_size: of all devices and hosts together.
    precision: of activations.
    threads: that load data.
  """

  data: Annotated[Any, typed.OneOf(DATA)]
  task: Annotated[Any, typed.OneOf(TASKS)]
  recipe: config_lib.Recipe = config_lib.Recipe()
  mesh: mesh_lib.Mesh = mesh_lib.Mesh()
  eval_batch_size: int = 256
  precision: Literal["float32", "bfloat16"] = "float32"
  threads: int = 4


def load_run(
  workdir: str | pathlib.Path | None,
  mesh: jax.sharding.Mesh,
  slots: Slots | None = None,
) -> tuple[nn.Module | None, Any]:
  """Model and parameters of a run's last checkpoint; `(None, None)` for None.

  Args:
    slots: build the model with these instead of those it was trained with.

  Raises:
    CheckpointError: there is none, or it cannot be read.
  """
  if workdir is None:
    return None, None
  config, params, _ = restore_run(workdir, mesh)
  return config.build_model(slots), params


def restore_run(
  workdir: str | pathlib.Path, mesh: jax.sharding.Mesh
) -> tuple[config_lib.Config, Any, int]:
  """Config, parameters (averaged ones if any) and step of a run."""
  saved, step = _last(workdir)
  config = config_lib.load(saved.config(step))
  params = saved.restore_params(step, mesh_lib.replicated(mesh))
  saved.close()
  return config, params, step


def _last(workdir: str | pathlib.Path) -> tuple[checkpoints.Checkpoints, int]:
  """The checkpoints of a run, and the step of the last."""
  saved = checkpoints.Checkpoints(pathlib.Path(workdir), read_only=True)
  step = saved.latest()
  if step is None:
    raise CheckpointError(f"{workdir}: has no checkpoint")
  return saved, step


def changed_config(
  workdir: str | pathlib.Path,
  recipe: str | None = None,
  keep: float | None = None,
  changes: Sequence[tuple[str, str]] = (),
) -> config_lib.Config:
  """The config of a run as it is evaluated; see `main`."""
  saved, step = _last(workdir)
  config = ml_collections.ConfigDict({**saved.config(step), "mesh": {}})
  saved.close()
  if recipe is not None:
    config.recipe = dict(name=recipe, keep=keep)
  settings.assign(config, lambda _: Evaluation, changes)
  return config_lib.load(config)


def evaluate(
  config: config_lib.Config, model: nn.Module, params: Any, mesh: Any
) -> dict[str, float]:
  """The task's metrics over the held-out split.

  Raises:
    ValueError: `eval_batch_size` does not divide over the devices.
    FloatingPointError: the loss is NaN or infinite.
  """
  mesh_lib.check_batch(mesh, "eval_batch_size", config.eval_batch_size)
  batches = pipeline.heldout_batches(
    config.data, config.eval_batch_size, config.threads
  )
  placed = (mesh_lib.put_batch(mesh, batch) for batch in batches)
  metrics = config.task.evaluate(model, params, placed)
  if not math.isfinite(metrics["loss"]):
    raise FloatingPointError(f"held-out loss is {metrics['loss']}")
  return metrics


def main(
  workdir: str | pathlib.Path,
  recipe: str | None = None,
  keep: float | None = None,
  changes: Sequence[tuple[str, str]] = (),
) -> dict[str, float]:
  """Evaluates the last checkpoint of a run.

  Args:
    recipe, keep: of the slots; None: as trained.
    changes: other settings of `Evaluation`, paths and texts.

  Raises:
    ConfigError: an unknown recipe, or `keep` without one.
    CheckpointError: see `load_run`.
  """
  if keep is not None and recipe is None:
    raise ConfigError(
      f"keep={keep}: needs recipe=, the one that is to keep that fraction"
    )
  config = changed_config(workdir, recipe, keep, changes)
  model, mesh = config.build_model(), config.mesh.build()
  _, params, step = restore_run(workdir, mesh)
  metrics = evaluate(config, model, params, mesh)
  return {"step": step, **metrics}


if __name__ == "__main__":
  import json

  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      __doc__ or "",
      (
        launch.workdir(),
        Option("recipe", str, None, "Fill the slots with this recipe."),
        Option("keep", float, None, "Fraction of tokens that remain."),
        *launch.COMMON,
      ),
      (Evaluation,),
      reads_file=False,
    ),
    lambda given: print(
      json.dumps(main(given.workdir, given.recipe, given.keep, given.changes))
    ),
  )
