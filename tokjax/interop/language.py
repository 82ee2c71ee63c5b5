"""Published language models: a folder or hub id to a `Decoder` with weights."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from tokjax.interop import convert, files, tables
from tokjax.interop import families_language as language_families
from tokjax.interop.families_vision import Family, Json
from tokjax.interop.tokenizer import Tokenizer
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.slots import Slots

PLAIN = Slots()


@dataclasses.dataclass(frozen=True)
class Language:
  """A class of `transformers`.

  Attributes:
    name: of the class.
    family: how its config.json is written.
    norms: rows of the table for the norms of a block.
    prefixes: what stands before the decoder's tensors.
    ignored: starts of the names of tensors that belong to other parts.
  """

  name: str
  family: Family
  norms: tuple[tables.Row, ...] = tables.TWO_NORMS
  prefixes: tuple[str, ...] = ("model.", "")
  ignored: tuple[str, ...] = ()

  def prefix(self, names: Iterable[str]) -> str:
    """The prefix that a file's decoder has (the usual one if none fits)."""
    for prefix in self.prefixes:
      if any(name.startswith(f"{prefix}layers.") for name in names):
        return prefix
    return self.prefixes[0]

  def is_ignored(self, name: str, tied: bool) -> bool:
    """Tensors of other parts, constants, and a copy of a tied embedding."""
    if name.endswith("rotary_emb.inv_freq") or name.startswith(self.ignored):
      return True
    return tied and name.endswith("lm_head.weight")

  def table(self) -> tuple[tables.Row, ...]:
    """The rows that a file of this class may have."""
    return (*tables.DECODER, *self.norms)

  def read(self, whole: Json) -> DecoderConfig:
    """The configuration in a config.json.

    Raises:
      ValueError: a value that is absent or not supported.
    """
    part = {**self.family.defaults, **whole.get("text_config", whole)}
    for key, value in self.family.refused.items():
      if part.get(key) == value:
        raise ValueError(f"config.json: {key}={value} is not supported")
    values: dict[str, Any] = dict(self.family.implied)
    for field in self.family.fields:
      if field.theirs not in part:
        raise ValueError(f"config.json: has no {field.theirs!r}")
      try:
        values[field.ours] = field.read(part[field.theirs], part)
      except (KeyError, ValueError) as error:
        raise ValueError(f"config.json: {field.theirs}: {error}") from error
    return DecoderConfig(**values)


LANGUAGE = {
  language.name: language
  for language in (
    Language("LlamaForCausalLM", language_families.LLAMA),
    Language("MistralForCausalLM", language_families.MISTRAL),
    Language("Qwen2ForCausalLM", language_families.QWEN2),
    Language("Qwen3ForCausalLM", language_families.QWEN3),
    Language("Gemma2ForCausalLM", language_families.GEMMA2, tables.FOUR_NORMS),
    Language("Gemma3ForCausalLM", language_families.GEMMA3, tables.FOUR_NORMS),
    # The text part of a model that also reads images.
    Language(
      "Gemma3ForConditionalGeneration",
      language_families.GEMMA3,
      tables.FOUR_NORMS,
      ("model.language_model.", "language_model.model."),
      (
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
      ),
    ),
  )
}


def load_decoder(
  source: str | pathlib.Path,
  *,
  slots: Slots = PLAIN,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  revision: str | None = None,
) -> tuple[Decoder, dict[str, Any], Tokenizer | None]:
  """A published language model, built with slots.

  Args:
    source: folder with config.json and safetensors, or a hub id.
    slots: the recipe.
    dtype: of activations.
    param_dtype: of parameters; None: as stored.
    revision: branch, tag or commit on the hub.

  Returns:
    The model, its parameters (`model.apply({"params": params}, tokens)`) and
    its tokenizer, None if the folder has no tokenizer.json.

  Raises:
    FileNotFoundError: no such folder, hub id or file.
    ValueError: a family or a value that this model cannot follow.
    CheckpointError: lists every tensor that does not fit, or names a file that
      is damaged.
  """
  folder = files.locate(source, revision)
  language, config, tensors = open_folder(folder)
  prefix = language.prefix(tensors.headers)
  params = convert.read_params(
    tensors.headers,
    tensors.read,
    convert.entries(language.table(), config, prefix),
    config,
    ignored=lambda name: language.is_ignored(name, config.tied),
    dtype=param_dtype,
    source=str(source),
  )
  return Decoder(config, slots, dtype), params, Tokenizer.find(folder)


def decoder_config(
  source: str | pathlib.Path, *, revision: str | None = None
) -> DecoderConfig:
  """The architecture of a folder or hub id, without reading its tensors."""
  return open_folder(files.locate(source, revision))[1]


def open_folder(folder: pathlib.Path):
  """Class, configuration and tensor files of a folder."""
  whole: Mapping[str, Any] = files.read_json(folder / "config.json")
  names = whole.get("architectures") or []
  known = [name for name in names if name in LANGUAGE]
  if not known:
    raise ValueError(
      f"{folder}: config.json names {names or 'no architectures'}, which is no"
      f" language model that can be read; those are {', '.join(LANGUAGE)}"
    )
  language = LANGUAGE[known[0]]
  return language, language.read(whole), files.TensorFiles(folder)
