"""Classes of `transformers` for language: family, norms and names of each."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

from tokjax.interop import families_language as families
from tokjax.interop import fields, tables
from tokjax.interop.fields import Family, Json, Problems
from tokjax.interop.files import TensorFiles
from tokjax.interop.layout import Layout, prefix_of
from tokjax.interop.tokenizer import Tokenizer
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class Language(Layout):
  """A class of `transformers`.

  Attributes:
    name: of the class.
    family: how its config.json is written.
    norms: rows of the table for the norms of a block.
    prefixes: of the decoder's tensors; the first is written, all are read.
    ignored: starts of the names of tensors that belong to other parts.
    written: it can be exported; a model with a vision tower cannot.
  """

  name: str
  family: Family
  norms: tuple[tables.Row, ...] = tables.TWO_NORMS
  prefixes: tuple[str, ...] = ("model.", "")
  ignored: tuple[str, ...] = ()
  written: bool = True

  holds = DecoderConfig

  def prefix(self, names: Collection[str]) -> str:
    """The prefix that a file's decoder has (the usual one if none fits)."""
    return prefix_of(names, self.prefixes, "layers.")

  def is_ignored(self, name: str, config: DecoderConfig) -> bool:
    """Tensors of other parts, constants, and a copy of a tied embedding."""
    if name.endswith("rotary_emb.inv_freq") or name.startswith(self.ignored):
      return True
    return config.tied and name.endswith("lm_head.weight")

  def table(self, config: DecoderConfig) -> tuple[tables.Row, ...]:
    """The rows that a file of this class may have."""
    del config
    return (*tables.DECODER, *self.norms)

  def their_name(self, ours: str) -> str:
    """What config.json calls a field of the configuration."""
    return self.family.their_name(ours)

  def build(self, config: DecoderConfig, slots: Slots, dtype: Any) -> Decoder:
    """The model."""
    return Decoder(config, slots, dtype)

  def input_of(
    self, folder: pathlib.Path, config: DecoderConfig
  ) -> Tokenizer | None:
    """The folder's tokenizer, None if it has none."""
    return Tokenizer.find(folder, config.vocabulary)

  def read(self, whole: Json, names: Collection[str] = ()) -> DecoderConfig:
    """The configuration in a config.json."""
    del names
    problems = Problems("config.json")
    values: dict[str, Any] = {}
    with problems.collect():
      part = whole
      if "text_config" in whole:
        part = dict(fields.mapping(whole, "text_config"))
        fields.refuse(whole, fields.QUANTISED, problems)
        if "tie_word_embeddings" in whole:
          # The whole model has the output matrix, and says whether it is tied.
          part["tie_word_embeddings"] = whole["tie_word_embeddings"]
      values = self.family.read(part, problems)
    return problems.build(DecoderConfig, values)

  def settle(
    self, config: DecoderConfig, tensors: TensorFiles
  ) -> DecoderConfig:
    """Not tied if the file has an output matrix that is not the embedding.

    As `transformers` 5 (5.24, `PreTrainedModel.tie_weights`), also
    where `tie_word_embeddings` is true.
    """
    prefix = self.prefix(tensors.headers)
    embedding = f"{prefix}embed_tokens.weight"
    head = f"{tables.head_prefix(prefix)}lm_head.weight"
    both = {embedding, head} <= tensors.headers.keys()
    if config.tied and both and not tensors.equal(embedding, head):
      return dataclasses.replace(config, tied=False)
    return config

  def resolved(self, config: DecoderConfig) -> DecoderConfig:
    """With the kind of every block; and without what no block uses."""
    layers = tuple(config.layer(i) for i in range(config.depth))
    sliding, local = "sliding" in layers, config.local_rotary
    scale = config.query_scale
    return dataclasses.replace(
      config,
      layers=layers,
      head_dim=config.features,
      window=config.window if sliding else None,
      local_rotary=local if sliding and local != config.rotary else None,
      query_scale=None if scale == config.features else scale,
    )

  def write(self, config: DecoderConfig) -> dict[str, Any]:
    """A config.json with all of a configuration that this class can hold."""
    whole = self.family.write(self.resolved(config))
    return {"architectures": [self.name], **whole}


LANGUAGE = {
  language.name: language
  for language in (
    Language("LlamaForCausalLM", families.LLAMA),
    Language("MistralForCausalLM", families.MISTRAL),
    Language("Qwen2ForCausalLM", families.QWEN2),
    Language("Qwen3ForCausalLM", families.QWEN3),
    Language("Gemma2ForCausalLM", families.GEMMA2, tables.FOUR_NORMS),
    Language("Gemma3ForCausalLM", families.GEMMA3, tables.FOUR_NORMS),
    # The text part of a model that also reads images.
    Language(
      "Gemma3ForConditionalGeneration",
      families.GEMMA3,
      tables.FOUR_NORMS,
      ("model.language_model.", "language_model.model."),
      (
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
      ),
      written=False,
    ),
  )
}
