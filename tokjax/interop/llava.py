"""LLaVA: a CLIP or SigLIP tower, a projector and a decoder in one folder."""

import dataclasses
import pathlib
import re
from collections.abc import Collection
from typing import Any

from tokjax.interop import (
  convert,
  families_language,
  families_vision,
  fields,
  preprocessing_files,
  tables,
)
from tokjax.interop.architectures_language import Language
from tokjax.interop.architectures_vision import Architecture
from tokjax.interop.convert import Entry
from tokjax.interop.fields import Family, Field, Json, Problems
from tokjax.interop.files import TensorFiles
from tokjax.interop.inputs import AnyResolution, ImagesAndText, OneOrMany
from tokjax.interop.layout import prefix_of
from tokjax.interop.tokenizer import Tokenizer
from tokjax.interop.towers import Towers, within
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.projector import ProjectorConfig
from tokjax.models.vit import ViTConfig
from tokjax.models.vlm_config import VisionLanguageConfig

# What `transformers` 5.24 has where text_config is silent, as that of
# llava-1.5-7b-hf is.
SEVEN_BILLION = {
  "hidden_size": 4096,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
}
SILENT = {
  "llama": {"vocab_size": 32_000, "intermediate_size": 11_008},
  "mistral": {"vocab_size": 32_000, "intermediate_size": 14_336},
  "qwen2": {"vocab_size": 151_936, "intermediate_size": 22_016},
}
PREFIXES = ("vision_tower.", "model.vision_tower.")
VISION = {
  family.model_type: Architecture(
    family.model_type, family, rows,
    tuple(f"{p}{inner}" for p in PREFIXES for inner in ("vision_model.", "")),
    # Published towers see 384 pixels in patches of 14.
    implied={"drop_edge": True},
  )
  for family, rows in (
    (families_vision.CLIP, tables.CLIP),
    (families_vision.SIGLIP, tables.SIGLIP),
  )
}  # fmt: skip
INSIDE = ("language_model.model.", "model.language_model.")
LANGUAGE = {
  family.model_type: Language(family.model_type, family, prefixes=INSIDE)
  for family in (
    families_language.LLAMA, families_language.MISTRAL, families_language.QWEN2
  )
}  # fmt: skip
# Names of tensors are those of all families.
DECODER = LANGUAGE["llama"]
PROJECTOR = (
  *tables.linear("linear1", "{p}linear_1"),
  *tables.linear("linear2", "{p}linear_2"),
)
PROJECTOR_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# Whether tokens in front of the patches go on to the language model.
STRATEGIES = {"default": False, "full": True}


def feature_layer(part: Json, name: str) -> int:
  """Which hidden states are taken, counted from the end: -1 are the last."""
  value = fields.get(part, name)
  if not fields.is_integer(value):
    raise fields.wrong(name, value, "one integer; several layers are not read")
  return value


def pinpoints(part: Json, name: str) -> tuple[tuple[int, int], ...]:
  """Heights and widths that images are brought to; null: the usual five."""
  value = part.get(name)
  value = PINPOINTS if value is None else value
  pair = lambda x: isinstance(x, list | tuple) and len(x) == 2
  if not isinstance(value, list | tuple) or not all(map(pair, value)):
    raise fields.wrong(name, value, "a list of pairs (height, width)")
  numbers = [n for point in value for n in point]
  if not value or not all(fields.is_integer(n) and n > 0 for n in numbers):
    raise fields.wrong(name, value, "pairs of integers of 1 or more")
  return tuple((h, w) for h, w in value)


OWN = Family(
  "llava",
  (
    Field("image_token", "image_token_index", fields.natural),
    Field(
      "activation",
      "projector_hidden_act",
      fields.one_of(families_language.ACTIVATIONS),
    ),
    Field("bias", "multimodal_projector_bias", fields.flag),
    Field("layer", "vision_feature_layer", feature_layer),
    Field(
      "pass_class", "vision_feature_select_strategy", fields.one_of(STRATEGIES)
    ),
  ),
  {
    "image_token_index": 32_000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
  },
  {},
)

NEXT = dataclasses.replace(
  OWN, model_type="llava_next",
  fields=(*OWN.fields, Field("pinpoints", "image_grid_pinpoints", pinpoints)),
)  # fmt: skip



def most_crops(part: Json, name: str) -> int:
  """The number in "anyres_max_9"."""
  value = fields.string(part, name)
  found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", value)
  if found is None:
    raise fields.wrong(name, value, "anyres_max_ and a number")
  return int(found[1])


ONEVISION = dataclasses.replace(
  NEXT, model_type="llava_onevision",
  fields=(
    *NEXT.fields, Field("most_crops", "vision_aspect_ratio", most_crops)
  ),
  defaults={
    **NEXT.defaults,
    "image_token_index": 151_646,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [
      (384 * y, 384 * x) for y in range(1, 7) for x in range(1, 7)
    ],
  },
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Llava(Towers):
  """A class of `transformers`; it can be read only.

  Of the blocks behind the features only the first is read, as far as rules can
  ask it; nothing else depends on them.

  Attributes:
    name: of the class.
    family: how its config.json is written.
  """

  name: str = "LlavaForConditionalGeneration"
  family: Family = OWN

  def prefix(self, names: Collection[str]) -> str:
    """That of the projector; towers find their own, see `entries`."""
    return prefix_of(names, PROJECTOR_PREFIXES, "linear_1.weight")

  def table(self, config: VisionLanguageConfig) -> tuple[tables.Row, ...]:
    """The rows of the projector."""
    del config
    return PROJECTOR

  def entries(
    self, config: VisionLanguageConfig, names: Collection[str]
  ) -> list[Entry]:
    """The entries of all towers, under the names of the whole model."""
    vision = tower_of(config.vision)
    ahead = rows_of_block(vision.rows, config.vision.depth)
    parts = (
      ("vision", vision.rows, config.vision, vision),
      ("ahead", ahead, config, vision),
      ("projector", PROJECTOR, config, self),
      ("language", DECODER.table(config.language), config.language, DECODER),
    )
    outer = self.prefix(names).removesuffix(PROJECTOR_PREFIXES[0])
    newline = [tables.one("newline", f"{outer}image_newline")]
    found = within(
      (tower, convert.matches(
        rows, own, layout.prefix(names), within=tower if own is config else ""
      ))
      for tower, rows, own, layout in parts
    )  # fmt: skip
    found += convert.matches(newline, config, "")
    return convert.complete(found, config)

  def is_ignored(self, name: str, config: VisionLanguageConfig) -> bool:
    """Blocks behind the features, constants, a copy of a tied embedding."""
    vision = tower_of(config.vision)
    if (block := block_of(name)) >= 0:
      return block >= config.vision.depth
    inside = name.startswith(vision.prefixes)
    if inside and (".head." in name or vision.is_ignored(name, config.vision)):
      return True
    return DECODER.is_ignored(name, config.language)

  def their_name(self, ours: str) -> str:
    """What config.json calls a field, with the part that it is in."""
    part, _, field = ours.partition(".")
    family = {
      "vision": families_vision.CLIP, "language": families_language.LLAMA
    }.get(part)  # fmt: skip
    if family is None:
      return self.family.their_name(ours)
    key = {"vision": "vision_config", "language": "text_config"}[part]
    return f"{key}.{family.their_name(field)}"

  def input_of(
    self, folder: pathlib.Path, config: VisionLanguageConfig
  ) -> ImagesAndText:
    """What makes its inputs; a part is None where the folder lacks it."""
    pixels = preprocessing_files.read(folder, config.vision.channels)
    if pixels is not None and config.pinpoints:
      if config.most_crops is None:
        pixels = AnyResolution(pixels, config.pinpoints)
      else:
        frame = preprocessing_files.read_video(folder, config.vision.channels)
        pixels = OneOrMany(pixels, config.pinpoints, frame)
    return ImagesAndText(
      Tokenizer.find(folder, config.language.vocabulary), pixels
    )

  def read(
    self, whole: Json, names: Collection[str] = ()
  ) -> VisionLanguageConfig:
    """The configuration in a config.json."""
    problems = Problems("config.json")
    values: dict[str, Any] = {}
    with problems.collect():
      values = self.family.read(whole, problems)
    vision, ahead, language = None, False, None
    with problems.collect():
      vision, ahead = read_vision(whole, names, values)
    with problems.collect():
      one = self.family is ONEVISION
      language = read_language(whole, "qwen2" if one else "llama")
    problems.check()
    assert vision is not None and language is not None
    projector = ProjectorConfig(
      language.width, values["activation"], values["bias"]
    )
    return problems.build(
      VisionLanguageConfig,
      dict(
        vision=vision, projector=projector, language=language,
        image_token=values["image_token"],
        pass_class=values["pass_class"] and bool(vision.kinds), ahead=ahead,
        pinpoints=values.get("pinpoints", ()),
        most_crops=values.get("most_crops"),
      ),
    )  # fmt: skip

  def settle(
    self, config: VisionLanguageConfig, tensors: TensorFiles
  ) -> VisionLanguageConfig:
    """With an output matrix of its own where the file has one."""
    language = DECODER.settle(config.language, tensors)
    return dataclasses.replace(config, language=language)


def rows_of_block(
  rows: tuple[tables.Row, ...], block: int
) -> list[tables.Row]:
  """The rows of one block, as those of a module of its own."""
  return [
    tables.Row(
      tuple(name.removeprefix(f"{tables.BLOCK}/") for name in row.ours),
      row.theirs.replace("{i}", str(block)),
      row.arrange,
    )
    for row in rows
    if "{i}" in row.theirs
  ]


def block_of(name: str) -> int:
  """The block of the encoder that a tensor is of; -1: it is of none."""
  block = re.match(r".*vision_tower\..*encoder\.layers?\.(\d+)\.", name)
  return -1 if block is None else int(block[1])


def tower_of(config: ViTConfig) -> Architecture:
  """The layout of the encoder: CLIP has a class token, SigLIP none."""
  return VISION["clip_vision_model" if config.kinds else "siglip_vision_model"]


def read_vision(
  whole: Json, names: Collection[str], values: Json
) -> tuple[ViTConfig, bool]:
  """The encoder up to its features, and whether a block follows them."""
  part = fields.mapping(whole, "vision_config")
  kind = {"model_type": part.get("model_type", "clip_vision_model")}
  tower = fields.one_of(VISION)(kind, "model_type")
  full = tower.read({**part}, names)
  depth = full.depth
  blocks = blocks_of(values.get("layer", -1), depth)
  if not full.kinds and not values.get("pass_class", True):
    raise ValueError(
      "vision_feature_select_strategy='default': drops the first token, which"
      " is a patch in an encoder without a class token; must be 'full'"
    )
  cut = dataclasses.replace(full, depth=blocks, pool="none")
  return cut, blocks < depth


def blocks_of(layer: int, depth: int) -> int:
  """How many blocks run before the features leave.

  Args:
    layer: of the hidden states, numbered from 0, before the first block, or
      from the end.
    depth: blocks of the encoder.
  """
  blocks = layer if layer >= 0 else depth + 1 + layer
  if not 1 <= blocks <= depth:
    raise fields.wrong(
      "vision_feature_layer", layer, f"a layer of the {depth} of the encoder"
    )
  return blocks


def read_language(whole: Json, usual: str = "llama") -> DecoderConfig:
  """The language model; `usual` is its type where none is stated."""
  part = {"model_type": usual, **fields.mapping(whole, "text_config")}
  layout = fields.one_of(LANGUAGE)(part, "model_type")
  silent = {**SEVEN_BILLION, **SILENT[part["model_type"]]}
  text = {"text_config": {**silent, **part}}
  if "tie_word_embeddings" in whole:
    text["tie_word_embeddings"] = whole["tie_word_embeddings"]
  return layout.read(text)


LLAVA = {
  layout.name: layout
  for layout in (
    Llava(),
    Llava("LlavaNextForConditionalGeneration", NEXT),
    Llava("LlavaOnevisionForConditionalGeneration", ONEVISION),
  )
}  # fmt: skip
