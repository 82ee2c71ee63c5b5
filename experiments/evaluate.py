"""Evaluation of a run or a published checkpoint, on any mesh.

python -m experiments.evaluate --workdir DIR
python -m experiments.evaluate --workdir DIR --recipe tome --keep 0.5
python -m experiments.evaluate --workdir DIR --config.eval_batch_size=64
python -m experiments.evaluate --checkpoint FOLDER_OR_HUB_ID \\
  --config.data.path=IMAGES

The last takes images IMAGES/test/CLASS/*.jpg; the names of the class folders
are matched with the labels of the checkpoint.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import ml_collections

from experiments import settings, sources, typed
from experiments.data import DATA, pipeline
from experiments.data.images import FolderImages
from experiments.tasks import TASKS
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import published, trees
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
  saved, step = sources.last(workdir)
  config = config_lib.load(saved.config(step))
  params = saved.restore_params(step, mesh_lib.replicated(mesh))
  saved.close()
  return config, params, step


def published_config(
  checkpoint: str,
  recipe: str | None = None,
  keep: float | None = None,
  changes: Sequence[tuple[str, str]] = (),
) -> config_lib.Config:
  """The config that evaluates a published checkpoint; see `main`.

  The data is a folder of images unless `changes` say otherwise.
  """
  values = dict(
    model=dict(name="init"), init=checkpoint, data=dict(name="folder_images"),
    task=dict(name="classification"), mesh={},
  )  # fmt: skip
  config = ml_collections.ConfigDict(values)
  if recipe is not None:
    config.recipe = dict(name=recipe, keep=keep)
  settings.assign(config, lambda _: Evaluation, changes)
  return config_lib.load(config)


def changed_config(
  workdir: str | pathlib.Path,
  recipe: str | None = None,
  keep: float | None = None,
  changes: Sequence[tuple[str, str]] = (),
) -> config_lib.Config:
  """The config of a run as it is evaluated; see `main`."""
  saved, step = sources.last(workdir)
  config = ml_collections.ConfigDict({**saved.config(step), "mesh": {}})
  saved.close()
  if recipe is not None:
    config.recipe = dict(name=recipe, keep=keep)
  own = config_lib.load(config)
  settings.assign(config, lambda _: Evaluation, changes)
  changed = config_lib.load(config)
  if isinstance(changed.data, FolderImages) and changed.data != own.data:
    return with_labels(changed, own, str(workdir))
  return changed


def with_labels(
  changed: config_lib.Config, own: config_lib.Config, workdir: str
) -> config_lib.Config:
  """With class folders matched to the labels of the run, by name."""
  source = sources.source_of(own)
  folder = None if source is None else published.locate(source)
  names = sources.labels(own, folder)
  if not names:
    raise ConfigError(
      f"{workdir}: does not name its classes, so that class folders cannot be"
      " matched"
    )
  how = changed.data.preprocessing or getattr(own.data, "preprocessing", None)
  data = changed.data.for_checkpoint(how, names)
  return dataclasses.replace(changed, data=data)


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
  workdir: str | pathlib.Path | None = None,
  recipe: str | None = None,
  keep: float | None = None,
  changes: Sequence[tuple[str, str]] = (),
  *,
  checkpoint: str | None = None,
) -> dict[str, float]:
  """Evaluates the last checkpoint of a run, or a published checkpoint.

  Args:
    workdir: of the run; None: see `checkpoint`.
    recipe, keep: of the slots; None: as trained.
    changes: other settings of `Evaluation`, paths and texts.
    checkpoint: a published one, instead of a run; see `training.published`.

  Raises:
    ConfigError: an unknown recipe, `keep` without one, or a checkpoint that
      does not fit the data.
    DataError: class folders are no labels of the checkpoint.
    CheckpointError: see `load_run`.
  """
  if keep is not None and recipe is None:
    raise ConfigError(
      f"keep={keep}: needs recipe=, the one that is to keep that fraction"
    )
  if (workdir is None) == (checkpoint is None):
    raise ConfigError("give one of --workdir and --checkpoint")
  if checkpoint is not None:
    config = published_config(checkpoint, recipe, keep, changes)
    mesh, step = config.mesh.build(), {}
    params = published.first_params(config, mesh)
  else:
    config = changed_config(workdir, recipe, keep, changes)
    mesh = config.mesh.build()
    _, params, number = restore_run(workdir, mesh)
    step = {"step": number}
  model = config.build_model()
  if recipe is not None:
    trees.check_complete(config.recipe.name, model, params)
  return {**step, **evaluate(config, model, params, mesh)}


if __name__ == "__main__":
  import json

  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      __doc__ or "",
      (
        Option("workdir", str, None, "Directory of the run."),
        Option("checkpoint", str, None, "A published one, instead of a run."),
        Option("recipe", str, None, "Fill the slots with this recipe."),
        Option("keep", float, None, "Fraction of tokens that remain."),
        *launch.COMMON,
      ),
      (Evaluation,),
      reads_file=False,
    ),
    lambda given: print(
      json.dumps(
        main(
          given.workdir,
          given.recipe,
          given.keep,
          given.changes,
          checkpoint=given.checkpoint,
        )
      )
    ),
  )
