"""Language models in GGUF files, the format of llama.cpp."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tokjax.interop import fields, gguf_tokenizer, tables
from tokjax.interop.gguf_families import (
  ARCHITECTURES,
  FREQUENCIES,
  Architecture,
  with_frequencies,
)
from tokjax.interop.gguf_file import GgufFile
from tokjax.interop.layout import Layout
from tokjax.interop.tables import linear, one
from tokjax.interop.tensors import FLOATS, Header
from tokjax.interop.tokenizer import Tokenizer
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.slots import Slots

OURS, THEIRS = tables.LAYER, "blk.{i}"
ROWS = (
  one("embed/embedding", "token_embd.weight"),
  one(f"{OURS}/norm1/scale", f"{THEIRS}.attn_norm.weight"),
  *linear(f"{OURS}/attention/query", f"{THEIRS}.attn_q"),
  *linear(f"{OURS}/attention/key", f"{THEIRS}.attn_k"),
  *linear(f"{OURS}/attention/value", f"{THEIRS}.attn_v"),
  *linear(f"{OURS}/attention/out", f"{THEIRS}.attn_output"),
  one(f"{OURS}/attention/query_norm/scale", f"{THEIRS}.attn_q_norm.weight"),
  one(f"{OURS}/attention/key_norm/scale", f"{THEIRS}.attn_k_norm.weight"),
  one(f"{OURS}/norm2/scale", f"{THEIRS}.ffn_norm.weight"),
  *linear(f"{OURS}/mlp/gate", f"{THEIRS}.ffn_gate"),
  *linear(f"{OURS}/mlp/up", f"{THEIRS}.ffn_up"),
  *linear(f"{OURS}/mlp/down", f"{THEIRS}.ffn_down"),
  one("norm/scale", "output_norm.weight"),
  one("head/kernel", "output.weight", tables.LINEAR),
)
BEHIND = (
  one(f"{OURS}/post_norm1/scale", f"{THEIRS}.post_attention_norm.weight"),
  one(f"{OURS}/post_norm2/scale", f"{THEIRS}.post_ffw_norm.weight"),
)


@dataclasses.dataclass(frozen=True)
class Gguf(Layout):
  """The layout of one file.

  Attributes:
    architecture: how its metadata and tensors are written.
    file: that file.
  """

  architecture: Architecture
  file: GgufFile

  holds = DecoderConfig

  def prefix(self, names: Collection[str]) -> str:
    """Names have none."""
    del names
    return ""

  def table(self, config: DecoderConfig) -> tuple[tables.Row, ...]:
    """The rows that a file of this architecture may have."""
    del config
    return (*ROWS, *(BEHIND if self.architecture.four_norms else ()))

  def is_ignored(self, name: str, config: DecoderConfig) -> bool:
    """The frequencies, which `read` takes."""
    del config
    return name == FREQUENCIES

  def their_name(self, ours: str) -> str:
    """The key of the metadata for a field of the configuration."""
    return self.architecture.family().their_name(ours)

  def stated_as(self, ours: str) -> str:
    """The same; there is no config.json."""
    return self.their_name(ours)

  def build(self, config: DecoderConfig, slots: Slots, dtype: Any) -> Decoder:
    """The model."""
    return Decoder(config, slots, dtype)

  def input_of(
    self, folder: pathlib.Path, config: DecoderConfig
  ) -> Tokenizer | None:
    """The tokenizer in the metadata; None if there is none."""
    del folder
    return gguf_tokenizer.tokenizer_of(
      self.file.metadata,
      str(self.file.path),
      config.vocabulary,
      by_id=self.architecture.offset,
    )

  def read(
    self, whole: fields.Json, names: Collection[str] = ()
  ) -> DecoderConfig:
    """The configuration in the metadata."""
    del names
    problems = fields.Problems(str(self.file.path))
    values = self.architecture.read(whole, self.file.headers, problems)
    if FREQUENCIES in self.file.headers and "rotary" in values:
      with problems.collect():
        values["rotary"] = with_frequencies(
          values["rotary"], self._frequencies()
        )
    return problems.build(DecoderConfig, values)

  def _frequencies(self) -> np.ndarray:
    dtype = self.file.headers[FREQUENCIES].dtype
    if dtype not in FLOATS:
      raise ValueError(f"{FREQUENCIES} is {dtype}, must be one of {FLOATS}")
    return self.file.read([FREQUENCIES])[FREQUENCIES]


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Tensors of a file as the published model has them.

  llama.cpp's converter changes values on the way; that is undone here, in the
  precision of the file.

  Attributes:
    file: where they are.
    architecture: says which are changed.
    config: how many heads there are.
  """

  file: GgufFile
  architecture: Architecture
  config: DecoderConfig

  @property
  def headers(self) -> Mapping[str, Header]:
    """Shape and dtype of every tensor."""
    return self.file.headers

  def read(self, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named tensors."""
    found = self.file.read(names)
    return {name: self._undo(name, value) for name, value in found.items()}

  def _undo(self, name: str, value: np.ndarray) -> np.ndarray:
    if self.architecture.offset and name.endswith("norm.weight"):
      return value - np.ones((), value.dtype)
    if self.architecture.permuted and ".attn_q." in name:
      return unpermuted(value, self.config.heads)
    if self.architecture.permuted and ".attn_k." in name:
      return unpermuted(value, self.config.kv_heads)
    return value


def unpermuted(value: np.ndarray, heads: int) -> np.ndarray:
  """Rows of each head: neighbours (i, i + 1) back to pairs (i, i + k/2).

  Args:
    value: weight or bias of a projection to heads, `[heads * k, ...]`.
    heads: how many.
  """
  pairs = value.reshape(heads, -1, 2, *value.shape[1:])
  return np.swapaxes(pairs, 1, 2).reshape(value.shape)


def open_file(path: pathlib.Path) -> tuple[Gguf, DecoderConfig, Tensors]:
  """Layout, configuration and tensors of a GGUF file.

  Raises:
    FileNotFoundError: there is no such file.
    CheckpointError: it is damaged, or one part of several.
    ConfigError: it holds a model that is not read; lists all reasons.
    ImportError: the package `gguf` is not installed.
  """
  file = GgufFile(path)
  problems = fields.Problems(str(file.path))
  with problems.collect():
    name = fields.string(file.metadata, "general.architecture")
    if name not in ARCHITECTURES:
      known = ", ".join(ARCHITECTURES)
      raise ValueError(
        f"general.architecture={name!r}: must be one of {known}"
      )
  with problems.collect():
    parts = fields.optional(fields.natural, 0)(file.metadata, "split.count")
    if parts > 1:
      raise ValueError(
        f"split.count={parts}: the model is in {parts} files; join them first"
        " (llama-gguf-split --merge)"
      )
  problems.check()
  layout = Gguf(ARCHITECTURES[file.metadata["general.architecture"]], file)
  config = layout.read(file.metadata)
  return layout, config, Tensors(file, layout.architecture, config)
