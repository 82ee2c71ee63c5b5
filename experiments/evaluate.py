"""Evaluation of a run, on any mesh.

python -m experiments.evaluate --workdir DIR
python -m experiments.evaluate --workdir DIR --recipe tome --keep 0.5
"""

import math
import pathlib
from typing import Any

import flax.linen as nn
import jax

from experiments.data import pipeline
from experiments.training import checkpoints
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training.errors import CheckpointError
from experiments.typed import ConfigError
from tokjax.slots import Slots


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
  saved = checkpoints.Checkpoints(pathlib.Path(workdir), read_only=True)
  step = saved.latest()
  if step is None:
    raise CheckpointError(f"{workdir}: has no checkpoint")
  config = config_lib.load(saved.config(step))
  params = saved.restore_params(step, mesh_lib.replicated(mesh))
  saved.close()
  return config, params, step


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
) -> dict[str, float]:
  """Evaluates the last checkpoint of a run.

  Args:
    recipe, keep: of the slots; None: as trained.

  Raises:
    ConfigError: an unknown recipe, or `keep` without one.
    CheckpointError: see `load_run`.
  """
  if keep is not None and recipe is None:
    raise ConfigError(
      f"keep={keep}: needs recipe=, the one that is to keep that fraction"
    )
  mesh = mesh_lib.Mesh().build()
  config, params, step = restore_run(workdir, mesh)
  slots = None
  if recipe is not None:
    slots = config_lib.Recipe(recipe, keep).slots()
  metrics = evaluate(config, config.build_model(slots), params, mesh)
  return {"step": step, **metrics}


if __name__ == "__main__":
  import json

  from experiments import launch

  launch.evaluate(lambda *args: print(json.dumps(main(*args))))
