"""Qwen2-VL and Qwen2.5-VL: a native-resolution tower and a decoder."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

from tokjax.interop import (
  convert,
  families_language,
  fields,
  native_images,
  tables,
)
from tokjax.interop.architectures_language import Language
from tokjax.interop.convert import Entry
from tokjax.interop.fields import Family, Field, Json, Problems
from tokjax.interop.files import TensorFiles
from tokjax.interop.inputs import ImagesAndText
from tokjax.interop.layout import prefix_of
from tokjax.interop.rope import multi_axis
from tokjax.interop.tokenizer import Tokenizer
from tokjax.interop.towers import Towers, within
from tokjax.models.native_patches import NativeResolutionConfig
from tokjax.models.projector import ProjectorConfig
from tokjax.models.vlm_config import VisionLanguageConfig

# Where config.json is silent, what `transformers` 5.24 has.
TEXT = Family(
  "qwen2_vl_text",
  tuple(
    field if field.ours != "rotary" else dataclasses.replace(
      field, read=lambda part, name: multi_axis(part)
    )
    for field in families_language.QWEN2.fields
  ),
  {
    **families_language.QWEN2.defaults,
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "max_window_layers": 80,
  },
  {"qkv_bias": True},
)  # fmt: skip
LANGUAGE = Language(
  TEXT.model_type, TEXT,
  prefixes=("model.language_model.", "language_model.model.", "model."),
)  # fmt: skip
ACTIVATIONS = {**families_language.ACTIVATIONS, "quick_gelu": "quick_gelu"}


def channels(part: Json, name: str) -> int:
  """Published files call them `in_chans`."""
  key = "in_chans" if part.get(name) is None else name
  return fields.optional(fields.integer, 3)(part, key)


def mlp_dim(part: Json, name: str) -> int:
  """A multiple of the width."""
  return int(fields.integer(part, "embed_dim") * fields.positive(part, name))


def window(part: Json, name: str) -> int:
  """Side in patches, of whole blocks."""
  merge = fields.integer(part, "spatial_merge_size")
  patch = fields.integer(part, "patch_size")
  found = fields.integer(part, name) // merge // patch
  if not found:
    raise fields.wrong(name, part[name], f"{merge * patch} or more, a block")
  return found * merge


def full(part: Json, name: str) -> tuple[int, ...]:
  """Blocks without windows; those that the tower does not have say nothing."""
  value = fields.get(part, name)
  if not isinstance(value, list | tuple) or not all(
    fields.is_integer(x) and x >= 0 for x in value
  ):
    raise fields.wrong(name, value, "a list of integers of 0 or more")
  depth = fields.depth(part, "depth")
  return tuple(sorted({i for i in value if i < depth}))


def base(part: Json, name: str) -> float:
  """That of the tower's own rotary positions."""
  rope = fields.mapping(part, name)
  fields.optional(fields.one_of({"axial": "axial"}))(rope, "rope_type")
  return fields.optional(fields.positive, 10_000.0)(rope, "rope_theta")


SHARED = (
  Field("patch_size", "patch_size", fields.integer),
  Field("channels", "in_channels", channels),
  Field("frames", "temporal_patch_size", fields.integer),
  Field("merge", "spatial_merge_size", fields.integer),
  Field("depth", "depth", fields.depth),
  Field("heads", "num_heads", fields.integer),
  fields.named("activation", "hidden_act", ACTIVATIONS),
  Field("base", "rope_parameters", base),
)
SILENT = {
  "depth": 32,
  "num_heads": 16,
  "patch_size": 14,
  "spatial_merge_size": 2,
  "temporal_patch_size": 2,
}
VISION2 = Family(
  "qwen2_vl_vision",
  (
    *SHARED,
    Field("width", "embed_dim", fields.integer),
    Field("mlp_dim", "mlp_ratio", mlp_dim),
    Field("out", "hidden_size", fields.integer),
  ),
  {
    **SILENT,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
  },
  {},
)
VISION25 = Family(
  "qwen2_5_vl_vision",
  (
    *SHARED,
    Field("width", "hidden_size", fields.integer),
    Field("mlp_dim", "intermediate_size", fields.integer),
    Field("out", "out_hidden_size", fields.integer),
    Field("window", "window_size", window),
    Field("full", "fullatt_block_indexes", full),
  ),
  {
    **SILENT,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "hidden_act": "silu",
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
  },
  {"norm": "rms", "gated": True},
)
IMAGE_TOKEN = 151_655
PREFIXES = ("visual.", "model.visual.")
BLOCK = "{p}blocks.{i}"
VISION = (
  # A norm without a bias has the first of its two rows only.
  *tables.norm("block_{i}/norm1", f"{BLOCK}.norm1"),
  *tables.norm("block_{i}/norm2", f"{BLOCK}.norm2"),
  *tables.fused("block_{i}/attention", f"{BLOCK}.attn.qkv", "."),
  *tables.linear("block_{i}/attention/out", f"{BLOCK}.attn.proj"),
  *tables.linear("block_{i}/mlp/fc1", f"{BLOCK}.mlp.fc1"),
  *tables.linear("block_{i}/mlp/fc2", f"{BLOCK}.mlp.fc2"),
  *tables.linear("block_{i}/mlp/gate", f"{BLOCK}.mlp.gate_proj"),
  *tables.linear("block_{i}/mlp/up", f"{BLOCK}.mlp.up_proj"),
  *tables.linear("block_{i}/mlp/down", f"{BLOCK}.mlp.down_proj"),
)
PROJECTOR = (
  *tables.norm("norm", "{p}merger.ln_q"),
  *tables.linear("linear1", "{p}merger.mlp.0"),
  *tables.linear("linear2", "{p}merger.mlp.2"),
)


def patch_row(config: NativeResolutionConfig) -> tables.Row:
  """A convolution over frame, row and column that patches never overlap in."""
  side = config.patch_size
  shape = (config.width, config.channels, config.frames, side, side)
  arrange = tables.Arrange(
    lambda x, ours: x.reshape(len(x), -1).T, lambda x: x.T.reshape(shape)
  )
  return tables.one("patch/kernel", "{p}patch_embed.proj.weight", arrange)


@dataclasses.dataclass(frozen=True)
class QwenVL(Towers):
  """A class of `transformers`; it can be read only, and sees images only.

  Attributes:
    name: of the class.
    vision: how the tower is written in config.json.
  """

  name: str = "Qwen2VLForConditionalGeneration"
  vision: Family = VISION2

  def prefix(self, names: Collection[str]) -> str:
    """That of the vision tower."""
    return prefix_of(names, PREFIXES, "patch_embed.proj.weight")

  def table(self, config: VisionLanguageConfig) -> tuple[tables.Row, ...]:
    """The rows of the vision tower."""
    assert isinstance(config.vision, NativeResolutionConfig)
    return (patch_row(config.vision), *VISION)

  def entries(
    self, config: VisionLanguageConfig, names: Collection[str]
  ) -> list[Entry]:
    """The entries of all towers, under the names of the whole model."""
    own, words = self.prefix(names), LANGUAGE.prefix(names)
    parts = (
      ("vision", self.table(config), own),
      ("projector", PROJECTOR, own),
      ("language", LANGUAGE.table(config.language), words),
    )
    found = within(
      (tower, convert.matches(rows, config, prefix, within=tower))
      for tower, rows, prefix in parts
    )
    return convert.complete(found, config)

  def is_ignored(self, name: str, config: VisionLanguageConfig) -> bool:
    """Constants and a copy of a tied embedding."""
    return LANGUAGE.is_ignored(name, config.language)

  def their_name(self, ours: str) -> str:
    """What config.json calls a field, with the part that it is in."""
    part, _, field = ours.partition(".")
    if part == "vision":
      return f"vision_config.{self.vision.their_name(field)}"
    if part == "language":
      return TEXT.their_name(field)
    return {"image_token": "image_token_id"}.get(ours, ours)

  def input_of(
    self, folder: pathlib.Path, config: VisionLanguageConfig
  ) -> ImagesAndText:
    """What makes its inputs; a part is None where the folder lacks it."""
    assert isinstance(config.vision, NativeResolutionConfig)
    return ImagesAndText(
      Tokenizer.find(folder, config.language.vocabulary),
      native_images.read(folder, config.vision),
    )

  def read(
    self, whole: Json, names: Collection[str] = ()
  ) -> VisionLanguageConfig:
    """The configuration in a config.json, with or without a text_config."""
    del names
    problems = Problems("config.json")
    values: dict[str, Any] = {}
    with problems.collect():
      part = fields.mapping(whole, "vision_config")
      seen = self.vision.read(part, problems)
      out = seen.pop("out", None)
      problems.check()
      values["vision"] = vision = NativeResolutionConfig(**seen)
      values["projector"] = ProjectorConfig(
        out, hidden=vision.width * vision.merged, norm=vision.norm,
        parts=vision.merged, epsilon=vision.epsilon,
      )  # fmt: skip
    with problems.collect():
      token = {"image_token_id": IMAGE_TOKEN, **whole}
      values["image_token"] = fields.natural(token, "image_token_id")
    with problems.collect():
      values["language"] = LANGUAGE.read(tied(whole))
    return problems.build(VisionLanguageConfig, values)

  def settle(
    self, config: VisionLanguageConfig, tensors: TensorFiles
  ) -> VisionLanguageConfig:
    """With an output matrix of its own where the file has one."""
    language = LANGUAGE.settle(config.language, tensors)
    return dataclasses.replace(config, language=language)


def tied(whole: Json) -> Json:
  """Either place may say that the embedding is the output matrix."""
  name, text = "tie_word_embeddings", fields.mapping(whole, "text_config")
  if text.get(name) is None or name not in whole:
    return whole
  return {**whole, name: fields.flag(whole, name) or fields.flag(text, name)}


QWEN_VL = {
  layout.name: layout
  for layout in (
    QwenVL(), QwenVL("Qwen2_5_VLForConditionalGeneration", VISION25)
  )
}  # fmt: skip
