"""InternVL 2.5 and 3 as `transformers` has them: tiles and pixel shuffle."""

import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any

from tokjax.interop import (
  convert,
  families_language,
  families_vision,
  fields,
  llava,
  preprocessing_files,
  tables,
)
from tokjax.interop.architectures_vision import MASK_TOKEN, Architecture
from tokjax.interop.convert import Entry
from tokjax.interop.fields import Family, Field, Json, Problems
from tokjax.interop.files import TensorFiles
from tokjax.interop.inputs import ImagesAndText, Tiled
from tokjax.interop.layout import prefix_of
from tokjax.interop.tokenizer import Tokenizer
from tokjax.interop.towers import Towers, within
from tokjax.models.projector import ProjectorConfig
from tokjax.models.vit import ViTConfig
from tokjax.models.vlm_config import VisionLanguageConfig

BLOCK, THEIRS = tables.BLOCK, tables.HF_BLOCK
ROWS = (
  *tables.HF_EMBED,
  *tables.norm(f"{BLOCK}/norm1", f"{THEIRS}.layernorm_before"),
  *tables.linear(f"{BLOCK}/attention/query", f"{THEIRS}.attention.q_proj"),
  *tables.linear(f"{BLOCK}/attention/key", f"{THEIRS}.attention.k_proj"),
  *tables.linear(f"{BLOCK}/attention/value", f"{THEIRS}.attention.v_proj"),
  *tables.linear(
    f"{BLOCK}/attention/out", f"{THEIRS}.attention.projection_layer"
  ),
  tables.one(f"{BLOCK}/scale1", f"{THEIRS}.lambda_1"),
  *tables.norm(f"{BLOCK}/norm2", f"{THEIRS}.layernorm_after"),
  *tables.linear(f"{BLOCK}/mlp/fc1", f"{THEIRS}.mlp.fc1"),
  *tables.linear(f"{BLOCK}/mlp/fc2", f"{THEIRS}.mlp.fc2"),
  tables.one(f"{BLOCK}/scale2", f"{THEIRS}.lambda_2"),
)
VISION = Architecture(
  "internvl_vision",
  Family(
    "internvl_vision",
    (
      *families_vision.SHARED,
      families_vision.IMAGE,
      families_vision.MLP,
      Field("qkv_bias", "attention_bias", fields.flag),
    ),
    {
      "hidden_size": 1024,
      "num_hidden_layers": 24,
      "num_attention_heads": 16,
      "attention_bias": False,
      "intermediate_size": 4096,
      "hidden_act": "gelu",
      "layer_norm_eps": 1e-6,
      "image_size": 448,
      "patch_size": 14,
      "num_channels": 3,
    },
    {"layer_scale": True, "pool": "none", "head_norm": "none"},
    ("use_qk_norm",),
  ),
  ROWS,
  tuple(f"{p}vision_tower." for p in ("", "model.")),
  ignored=MASK_TOKEN,
  written=False,
)
# What must be so in vision_config, where it is stated.
ALWAYS = {
  "norm_type": "layer_norm",
  "use_mean_pooling": True,
  "use_absolute_position_embeddings": True,
}
PROJECTOR = (
  *tables.norm("norm", "{p}layer_norm"),
  *llava.PROJECTOR,
)


def merge(part: Json, name: str) -> int:
  """Patches on a side of the block that becomes one token."""
  ratio = fields.positive(part, name)
  if ratio > 1 or not (1 / ratio).is_integer():
    raise fields.wrong(name, ratio, "1 over an integer")
  return int(1 / ratio)


OWN = Family(
  "internvl",
  (
    Field("image_token", "image_token_id", fields.natural),
    Field("merge", "downsample_ratio", merge),
    Field(
      "activation",
      "projector_hidden_act",
      fields.one_of(families_language.ACTIVATIONS),
    ),
    Field("layer", "vision_feature_layer", llava.feature_layer),
    Field(
      "strategy",
      "vision_feature_select_strategy",
      fields.one_of({"default": "default"}),
    ),
  ),
  {
    "image_token_id": 151_667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
  },
  {},
)


@dataclasses.dataclass(frozen=True)
class InternVL(Towers):
  """A class of `transformers`; it can be read only."""

  name: str = "InternVLForConditionalGeneration"

  def prefix(self, names: Collection[str]) -> str:
    """That of the projector; towers find their own, see `entries`."""
    return prefix_of(names, llava.PROJECTOR_PREFIXES, "linear_1.weight")

  def table(self, config: VisionLanguageConfig) -> tuple[tables.Row, ...]:
    """The rows of the projector."""
    del config
    return PROJECTOR

  def entries(
    self, config: VisionLanguageConfig, names: Collection[str]
  ) -> list[Entry]:
    """The entries of all towers, under the names of the whole model."""
    words = llava.DECODER
    parts = (
      ("vision", ROWS, VISION.prefix(names)),
      ("projector", PROJECTOR, self.prefix(names)),
      ("language", words.table(config.language), words.prefix(names)),
    )
    found = within(
      (tower, convert.matches(rows, config, prefix, within=tower))
      for tower, rows, prefix in parts
    )
    return convert.complete(found, config)

  def is_ignored(self, name: str, config: VisionLanguageConfig) -> bool:
    """Blocks behind the features, constants, a copy of a tied embedding."""
    assert isinstance(config.vision, ViTConfig)
    if llava.block_of(name) >= config.vision.depth:
      return True
    if VISION.is_ignored(name, config.vision):
      return True
    return llava.DECODER.is_ignored(name, config.language)

  def their_name(self, ours: str) -> str:
    """What config.json calls a field, with the part that it is in."""
    part, _, field = ours.partition(".")
    if part == "vision":
      return f"vision_config.{VISION.their_name(field)}"
    if part == "language":
      return f"text_config.{families_language.LLAMA.their_name(field)}"
    return OWN.their_name(ours)

  def input_of(
    self, folder: pathlib.Path, config: VisionLanguageConfig
  ) -> ImagesAndText:
    """What makes its inputs; a part is None where the folder lacks it.

    Images are cut into tiles whatever `crop_to_patches` says in the folder, as
    the processor of the whole model does.
    """
    tokenizer = Tokenizer.find(folder, config.language.vocabulary)
    crop = preprocessing_files.read(folder, config.vision.channels)
    if crop is None:
      return ImagesAndText(tokenizer, None)
    part, file = preprocessing_files.stated(folder) or ({}, "")
    with fields.problems_of(file):
      least, most = (
        fields.optional(fields.integer, default)(part, name)
        for name, default in (("min_patches", 1), ("max_patches", 12))
      )
      return ImagesAndText(tokenizer, Tiled(crop, least, most))

  def read(
    self, whole: Json, names: Collection[str] = ()
  ) -> VisionLanguageConfig:
    """The configuration in a config.json."""
    problems = Problems("config.json")
    values: dict[str, Any] = {}
    with problems.collect():
      values = OWN.read(whole, problems)
    problems.check()
    vision = language = None
    with problems.collect():
      vision = read_vision(whole, names, values["layer"])
    with problems.collect():
      language = llava.read_language(
        {"tie_word_embeddings": True, **whole}, "qwen2"
      )
    problems.check()
    assert vision is not None and language is not None
    projector = ProjectorConfig(
      language.width, values["activation"], norm="layer", epsilon=1e-5
    )
    return problems.build(
      VisionLanguageConfig,
      dict(
        vision=vision, projector=projector, language=language, tiled=True,
        image_token=values["image_token"], merge=values["merge"],
      ),
    )  # fmt: skip

  def settle(
    self, config: VisionLanguageConfig, tensors: TensorFiles
  ) -> VisionLanguageConfig:
    """With an output matrix of its own where the file has one."""
    language = llava.DECODER.settle(config.language, tensors)
    return dataclasses.replace(config, language=language)


def read_vision(whole: Json, names: Collection[str], layer: int) -> ViTConfig:
  """The encoder up to its features."""
  part = fields.mapping(whole, "vision_config")
  for name, wanted in ALWAYS.items():
    if part.get(name, wanted) != wanted:
      raise fields.wrong(name, part[name], repr(wanted))
  full = VISION.read({**part}, names)
  return dataclasses.replace(full, depth=llava.blocks_of(layer, full.depth))


INTERNVL = {layout.name: layout for layout in (InternVL(),)}
