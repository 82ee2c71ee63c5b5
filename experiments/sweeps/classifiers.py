"""Image classifiers that sweeps are run on: weights and held-out images.

A run of the training loop or a published checkpoint. `name` in the config
chooses; each has `prepare(workdir)`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import typed
from experiments.data import DATA, pipeline
from experiments.data.images import FolderImages, to_image
from experiments.sweeps.runs import trained_seeds
from experiments.training import config as config_lib
from tokjax import interop
from tokjax.models import ViT, ViTConfig
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class Classifier:
  """An image classifier to fill with recipes.

  Attributes:
    model: its architecture.
    weights: its parameters, a set for each seed that it was trained with.
    build: the module with these slots.
    data: a data set, see `experiments.data.pipeline`.
    classes: the model's class for every label of the data; empty: the same.
    origin: where the weights come from, in words.
  """

  model: ViTConfig
  weights: tuple[Any, ...]
  build: Callable[[Slots], nn.Module]
  data: Any
  classes: tuple[int, ...]
  origin: str

  @property
  def params(self) -> Any:
    """The weights of the first seed, which are timed and drawn."""
    return self.weights[0]

  def batches(self, size: int) -> Iterator[pipeline.Batch]:
    """Held-out batches of one shape, with the model's classes as labels.

    "weight" is 0 for rows that fill the last batch up.
    """
    for batch in pipeline.heldout_batches(self.data, size):
      if self.classes:
        batch["label"] = np.asarray(self.classes)[batch["label"]]
      yield batch

  def rounds(self, size: int) -> int:
    """How many `batches` there are."""
    return -(-len(self.data.source("test")) // size)

  def images(self, count: int) -> np.ndarray:
    """The first held-out images, prepared, `[count, height, width, c]`."""
    return next(pipeline.heldout_batches(self.data, count))["image"]


@dataclasses.dataclass(frozen=True)
class Trained:
  """Models trained here, or the finished runs in the sweep's workdir.

  Attributes:
    train: config of a run; its recipe is the one of training only.
    seeds: number of runs, with the config's seed and those after it. Accuracy
      is their mean.
  """

  train: config_lib.Config
  seeds: int = 1

  def __post_init__(self):
    if self.seeds < 1:
      raise ValueError(f"seeds={self.seeds}: must be 1 or more")

  def prepare(self, workdir: pathlib.Path) -> Classifier:
    """Trains under `workdir / "train"`, "train_1", ... unless that is done."""
    weights, origin = trained_seeds(self.train, self.seeds, workdir)
    return Classifier(
      self.train.model,
      weights,
      self.train.build_model,
      self.train.data,
      (),
      origin,
    )


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A published checkpoint.

  Attributes:
    checkpoint: folder or hub id, see `tokjax.interop.load`.
    data: where the held-out images come from; they are prepared as the
      checkpoint asks for, not as the data set would.
    classes: the model's class for every label of the data set, for data with
      other labels than the checkpoint's; empty: they are the same.
    revision: of the checkpoint on the hub.
    precision: of activations.
  """

  checkpoint: str
  data: Annotated[Any, typed.OneOf(DATA)]
  classes: tuple[int, ...] = ()
  revision: str | None = None
  precision: Literal["float32", "bfloat16"] = "float32"

  def prepare(self, workdir: pathlib.Path) -> Classifier:
    """Reads it; nothing is written.

    Raises:
      ConfigError: images cannot be prepared for it, or labels do not fit.
    """
    del workdir
    dtype = config_lib.DTYPES[self.precision]
    model, params, how = interop.load(
      self.checkpoint, dtype=dtype, revision=self.revision
    )
    if not isinstance(model, ViT):
      raise typed.ConfigError(
        f"checkpoint={self.checkpoint!r}: is a {type(model).__name__}, no"
        " model of images"
      )
    if how is None:
      raise typed.ConfigError(
        f"checkpoint={self.checkpoint!r}: the folder does not state how images"
        " are prepared; add a preprocessor_config.json"
      )
    data = self._matched()
    self._check_labels(model.config, data)
    build = lambda slots: ViT(model.config, slots, dtype=dtype)
    params = jax.tree.map(jnp.asarray, params)
    data = _As(data, how)
    return Classifier(
      model.config, (params,), build, data, self.classes, self.checkpoint
    )

  def _matched(self) -> Any:
    """The data; class folders are matched with the checkpoint's labels."""
    by_name = isinstance(self.data, FolderImages) and self.data.match == "name"
    if not by_name or self.classes:
      return self.data
    labels = interop.labels_of(self.checkpoint, revision=self.revision)
    if not labels:
      raise typed.ConfigError(
        f"checkpoint={self.checkpoint!r}: does not name its classes (id2label"
        " of config.json); say in `classes` which of them each folder is"
      )
    return self.data.for_checkpoint(None, labels)

  def _check_labels(self, model: ViTConfig, data: Any) -> None:
    labels = data.num_classes
    if not self.classes and labels != model.num_classes:
      raise typed.ConfigError(
        f"data of {labels} classes, a checkpoint of {model.num_classes}: say in"
        " `classes` which of the model's classes each label is"
      )
    if self.classes and len(self.classes) != labels:
      raise typed.ConfigError(
        f"classes: has {len(self.classes)} entries for {labels} labels"
      )


@dataclasses.dataclass(frozen=True)
class _As:
  """A data set whose images are prepared by a checkpoint's preprocessing."""

  data: Any
  how: interop.Preprocessing

  def source(self, split: str) -> Any:
    return self.data.source(split)

  def prepare(self, element: dict[str, Any]) -> dict[str, Any]:
    image = self.how(to_image(element["image"]))
    return {"image": image, "label": element["label"]}


CLASSIFIERS = {"trained": Trained, "pretrained": Pretrained}
