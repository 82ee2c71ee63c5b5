"""Published checkpoints that runs start from or distil from.

`init` and `teacher` of a config name the workdir of a run, or anything that
`tokjax.interop` reads: a folder, a hub id, a name of `tokjax models`.
"""

import dataclasses
import pathlib
import re
from typing import Any, Literal

import flax.linen as nn
import jax

from experiments.data.images import FolderImages, Images
from experiments.data.labels import listed, match
from experiments.training import mesh as mesh_lib
from experiments.training import trees
from experiments.typed import ConfigError
from tokjax import interop, zoo
from tokjax.interop import Preprocessing, files
from tokjax.models import DecoderConfig, ViTConfig

# Parameters of what follows the pooling.
HEADS = r"^head/(classifier|distillation_classifier|pooler|projection)/"
# What may differ between a checkpoint and the model that starts from it: the
# position table is interpolated, heads are compared parameter by parameter.
ADAPTED = (
  "image_size", "position_resize", "num_classes", "pooler", "projection",
  "distillation_head",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FromInit:
  """The architecture of the published checkpoint that `init` names.

  Images are prepared as the checkpoint says.

  Attributes:
    head: "own": the checkpoint's classifier; class folders are matched with its
      labels by name. "new": a classifier that starts at random, for the classes
      of the data; it reads what the checkpoint pools, or the mean of the
      patches if that pools nothing.
    image_size: in pixels; None: the checkpoint's.
  """

  head: Literal["own", "new"] = "own"
  image_size: int | None = None


def is_run(source: str) -> bool:
  """Whether a run is meant; a published checkpoint otherwise."""
  return (pathlib.Path(source) / "checkpoints").is_dir()


def locate(source: str) -> pathlib.Path:
  """The folder or GGUF file of a published checkpoint.

  Raises:
    FileNotFoundError: there is none, and neither is there a run.
    FetchError: a name of `tokjax models` that was not fetched.
  """
  try:
    return files.locate(zoo.resolve(source))
  except FileNotFoundError as error:
    message = f"{error}; nor is it the workdir of a run"
    raise FileNotFoundError(message) from error


# ----- Architecture and data -----


def resolve(
  chosen: FromInit, init: str | None, data: Any
) -> tuple[ViTConfig | DecoderConfig, Any, str | None]:
  """Model, data and `fresh` of a config that takes them from a checkpoint.

  Raises:
    ConfigError: there is no such checkpoint, or it does not fit the data.
    DataError: class folders are no labels of it.
  """
  if init is None or is_run(init):
    raise ConfigError(
      f"model.name='init', init={init!r}: init must name a published"
      " checkpoint; to go on from a run, state its model"
    )
  folder = locate(init)
  own = interop.config_from(folder)
  if isinstance(own, DecoderConfig):
    return _language(chosen, init, own, data)
  if not isinstance(own, ViTConfig):
    raise ConfigError(
      f"init={init!r}: is a model of images and text, which is not trained here"
    )
  how = interop.inputs_of(folder)
  if chosen.image_size is not None:
    own = dataclasses.replace(own, image_size=chosen.image_size)
    if how is not None:
      how = dataclasses.replace(how, image_size=chosen.image_size)
  if chosen.head == "new":
    if isinstance(data, FolderImages) and not data.classes:
      data.source("train")  # Says which folder is not there.
    model = dataclasses.replace(
      own,
      num_classes=data.num_classes,
      pooler=None,
      projection=None,
      pool="mean" if own.pool == "none" else own.pool,
    )
    return model, _prepared(data, own, how), HEADS
  return own, _labelled(init, own, data, how, interop.labels_of(folder)), None


def _language(chosen: FromInit, init: str, own: DecoderConfig, data: Any):
  """The part of `resolve` for language models."""
  if chosen != FromInit():
    raise ConfigError(
      f"model: head and image_size are for models of images, init={init!r} is a"
      " language model"
    )
  if not hasattr(data, "for_tokenizer"):
    raise ConfigError(
      f"init={init!r}: is a language model; the data is {type(data).__name__}"
    )
  return own, data.for_tokenizer(str(locate(init))), None


def _prepared(
  data: Any, model: ViTConfig, how: Preprocessing | None, labels=()
) -> Any:
  """The data with the checkpoint's preprocessing, or else only its size."""
  if not isinstance(data, Images):
    return data
  high, wide = model.image_sides
  if how is None and high == wide:
    data = dataclasses.replace(data, size=high)
  return data.for_checkpoint(how, labels)


def _labelled(
  init: str,
  model: ViTConfig,
  data: Any,
  how: Preprocessing | None,
  labels: tuple[str, ...],
) -> Any:
  """The data with the labels of a checkpoint's own classifier."""
  new = "; for a classifier of its own: model.head=new"
  if model.num_classes is None:
    raise ConfigError(f"init={init!r}: has no classifier{new}")
  if isinstance(data, FolderImages):
    if not labels and data.match == "order":
      labels = tuple(map(str, range(model.num_classes)))
    if not labels:
      raise ConfigError(
        f"init={init!r}: does not name its {model.num_classes} classes"
        " (id2label of config.json), so that class folders can only be matched"
        f" by data.match=order{new}"
      )
    return _prepared(data, model, how, labels)
  if data.num_classes != model.num_classes:
    raise ConfigError(
      f"init={init!r}: has {model.num_classes} classes, the data"
      f" {data.num_classes}{new}"
    )
  return _prepared(data, model, how)


# ----- Parameters -----


def first_params(config: Any, mesh: jax.sharding.Mesh) -> Any:
  """Parameters of the published checkpoint that a config starts from.

  Those of the recipe's own modules are among them only if the checkpoint was
  exported with the same recipe.

  Raises:
    ConfigError: the checkpoint is of another architecture.
    CheckpointError, ValueError: see `interop.load`.
  """
  folder, wanted = locate(config.init), config.model
  own = interop.config_from(folder)
  if wrong := differences(own, wanted):
    raise ConfigError(
      f"init={config.init!r}: the checkpoint has {', '.join(wrong)};"
      " model.name=init takes its architecture"
    )
  changes = {}
  if isinstance(own, ViTConfig):
    changes = dict(
      image_size=wanted.image_size, position_resize=wanted.position_resize
    )
  exported = interop.recipe_of(folder) if folder.is_dir() else None
  slots = {}
  if exported is not None and exported[0] == config.recipe.name:
    slots = dict(slots=config.recipe.slots())
  _, params, _ = interop.load(folder, **slots, **changes)
  return jax.device_put(params, mesh_lib.replicated(mesh))


def differences(own: Any, wanted: Any) -> list[str]:
  """What keeps the parameters of one architecture from starting another."""
  if type(own) is not type(wanted):
    return [f"a {type(own).__name__} (config: a {type(wanted).__name__})"]
  # Tokens that were not pooled can be, for a head.
  bare = getattr(own, "pool", None) == "none"
  adapted = (*ADAPTED, "pool") if bare else ADAPTED
  return [
    f"{field.name}={getattr(own, field.name)!r} (config:"
    f" {getattr(wanted, field.name)!r})"
    for field in dataclasses.fields(own)
    if field.name not in adapted
    and getattr(own, field.name) != getattr(wanted, field.name)
  ]


def without_fresh(params: Any, fresh: str | None, model: Any) -> Any:
  """Parameters to start from, without those that start at random.

  Args:
    params: of a run or a checkpoint.
    fresh: regular expression on their names; None: all are used.
    model: the model's parameters, or shapes of them.

  Raises:
    ValueError: the expression finds no parameter of the model.
  """
  if fresh is None:
    return params
  trees.matching(model, (fresh,), "fresh")
  kept = {
    name: x for name, x in trees.named(params).items()
    if not re.search(fresh, name)
  }  # fmt: skip
  return trees.nested(kept)


def load_teacher(
  config: Any, mesh: jax.sharding.Mesh, dtype: Any
) -> tuple[nn.Module, Any]:
  """Model and parameters of the published checkpoint that is distilled from.

  Raises:
    ConfigError: its answers or its images are not those of the config.
  """
  folder, where = locate(config.teacher), f"teacher={config.teacher!r}"
  model, params, how = interop.load(folder, dtype=dtype)
  language = isinstance(model.config, DecoderConfig)
  name = "vocabulary" if language else "num_classes"
  theirs = getattr(model.config, name, None)
  ours = getattr(config.model, name, None)
  if theirs != ours or theirs is None:
    raise ConfigError(
      f"{where}: its {name} is {theirs}, that of the model {ours}"
    )
  data = config.data
  if isinstance(how, Preprocessing) and isinstance(data, Images):
    for field in ("mean", "std"):
      if getattr(how, field) != getattr(data, field):
        raise ConfigError(
          f"{where}: expects images with {field}={getattr(how, field)}, the"
          f" data has {getattr(data, field)}"
        )
  labels = interop.labels_of(folder)
  named = isinstance(data, FolderImages) and data.match == "name"
  if labels and named:
    order = match(data.classes, labels, where)
    if order != tuple(range(len(labels))):
      raise ConfigError(
        f"{where}: its labels are in another order: {listed(labels)}; those of"
        f" the data are: {listed(data.classes)}"
      )
  return model, jax.device_put(params, mesh_lib.replicated(mesh))
