"""Prismatic and OpenVLA: one or two towers of timm, a projector, a decoder.

Read from prismatic/extern/hf of openvla/openvla (c8f03f4), whose classes are
those of published folders; `transformers` has none. The features are those of
the last block but one, without final norm and without the tokens in front; the
projector has three layers where two encoders are joined. Prompts have no
placeholder: the tokens of the image stand behind the first token. Here the
padding token is the placeholder, which no text has.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Collection
from typing import Any

from tokjax.interop import (
  actions,
  convert,
  families_language,
  fields,
  llava,
  prismatic_images,
  tables,
  timm,
)
from tokjax.interop.convert import Entry
from tokjax.interop.fields import Family, Field, Json, Problems
from tokjax.interop.files import TensorFiles
from tokjax.interop.inputs import ImagesAndText
from tokjax.interop.layout import prefix_of
from tokjax.interop.tokenizer import Tokenizer
from tokjax.interop.towers import Towers, within
from tokjax.models.projector import ProjectorConfig
from tokjax.models.vit import ViTConfig
from tokjax.models.vlm_config import VisionLanguageConfig

# timm's names of the encoders without what they were trained on; sizes of
# images are those of config.json. timm's activation of SigLIP is the exact
# gelu, other than that of `transformers`.
DINO = {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
SIGLIP = {
  "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362,
  "class_token": False,
}  # fmt: skip
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
CLIP = {"pre_norm": True}
# Of the norms of CLIP; all others have 1e-6.
CLIP_EPSILON = 1e-5
ENCODERS: dict[str, Json] = {
  "vit_large_patch14_reg4_dinov2": {**LARGE, **DINO, "patch_size": 14},
  "vit_so400m_patch14_siglip_224": {**SIGLIP, "patch_size": 14},
  "vit_so400m_patch14_siglip_384": {**SIGLIP, "patch_size": 14},
  "vit_large_patch16_224": {**LARGE, "patch_size": 16},
  "vit_base_patch16_clip_224": {**BASE, **CLIP, "patch_size": 16},
  "vit_large_patch14_clip_224": {**LARGE, **CLIP, "patch_size": 14},
  "vit_large_patch14_clip_336": {**LARGE, **CLIP, "patch_size": 14},
}
ROWS = tuple(
  dataclasses.replace(
    row, theirs="{p}" + row.theirs.replace(".gamma", ".scale_factor")
  )
  for row in tables.TIMM
)
FIRST, SECOND = "featurizer.", "fused_featurizer."
# What is behind the features, without their blocks.
BEHIND = r"(norm|fc_norm|attn_pool|head)\."
OWN = Family(
  "openvla",
  (
    Field("image_token", "pad_token_id", fields.natural),
    Field("encoders", "timm_model_ids", fields.strings),
    Field("fused", "use_fused_vision_backbone", fields.flag),
  ),
  {"pad_token_id": 32_000},
  {},
)


def sides(whole: Json, count: int) -> list[int]:
  """Sides of the images of each encoder, in pixels."""
  value = fields.get(whole, "image_sizes")
  if (
    not isinstance(value, list | tuple)
    or len(value) != count
    or not all(fields.is_integer(n) and n > 0 for n in value)
  ):
    raise fields.wrong("image_sizes", value, f"{count} integers of 1 or more")
  return list(value)


def each(whole: Json, name: str, count: int) -> list[Any]:
  """One value for each encoder, or null for all."""
  value = whole.get(name)
  value = [None] * count if value is None else value
  if not isinstance(value, list | tuple) or len(value) != count:
    raise fields.wrong(name, value, f"a list of {count}, one an encoder")
  return list(value)


def encoder(
  name: str, side: int, activation: Any, changes: Any
) -> ViTConfig:
  """A tower up to its features.

  Args:
    name: of timm's model.
    side: of images.
    activation: timm's name; None: the model's own.
    changes: arguments of timm's model that differ; None: none do.
  """
  known = fields.one_of(ENCODERS)
  own = known({"timm_model_ids": name.split(".")[0]}, "timm_model_ids")
  part = {"timm_model_args": changes}
  args = {**own, **fields.mapping(part, "timm_model_args")}
  args |= {"img_size": side, "num_classes": 0, "global_pool": ""}
  if activation is not None:
    args["act_layer"] = activation
  problems = Problems("config.json")
  if unknown := sorted(set(args) - timm.KNOWN):
    problems.found.append(f"timm_model_args {unknown} are not supported")
  values = fields.read_fields(timm.FIELDS, {**timm.DEFAULTS, **args}, problems)
  problems.check()
  embedded = values["position_on_class"] and values["registers"] > 0
  values |= {"position_on_registers": embedded, "head_norm": "none"}
  values["patch_bias"] = not values["pre_norm"]
  values["epsilon"] = CLIP_EPSILON if "_clip_" in name else 1e-6
  depth = values.pop("depth")
  if depth < 2:
    problems.found.append(f"depth={depth}: must be 2 or more")
  # Bare features: the head is not run.
  make = functools.partial(ViTConfig, depth=depth - 1, drop_edge=True)
  return problems.build(make, values)


@dataclasses.dataclass(frozen=True)
class Prismatic(Towers):
  """A class of openvla/openvla; it can be read only.

  Attributes:
    name: of the class.
    acts: it predicts actions.
  """

  name: str = "PrismaticForConditionalGeneration"
  acts: bool = False

  def prefix(self, names: Collection[str]) -> str:
    """That of the projector; towers find their own, see `entries`."""
    return prefix_of(names, ("projector.",), "fc1.weight")

  def table(self, config: VisionLanguageConfig) -> tuple[tables.Row, ...]:
    """The rows of the projector."""
    layers = range(1, config.projector.layers + 1)
    rows = (tables.linear(f"linear{i}", f"{{p}}fc{i}") for i in layers)
    return tuple(row for pair in rows for row in pair)

  def entries(
    self, config: VisionLanguageConfig, names: Collection[str]
  ) -> list[Entry]:
    """The entries of all towers, under the names of the whole model."""
    words, own = llava.DECODER, f"vision_backbone.{FIRST}"
    parts = [
      ("vision", ROWS, own),
      ("ahead", llava.rows_of_block(ROWS, config.vision.depth), own),
      ("projector", self.table(config), self.prefix(names)),
      ("language", words.table(config.language), words.prefix(names)),
    ]
    if config.fused is not None:
      parts.append(("fused", ROWS, f"vision_backbone.{SECOND}"))
    found = within(
      (tower, convert.matches(rows, config, prefix, within=tower))
      for tower, rows, prefix in parts
    )
    return convert.complete(found, config)

  def is_ignored(self, name: str, config: VisionLanguageConfig) -> bool:
    """What is behind the features, constants, a copy of a tied embedding."""
    for prefix, tower in ((FIRST, config.vision), (SECOND, config.fused)):
      inner = name.removeprefix(f"vision_backbone.{prefix}")
      if tower is None or inner == name:
        continue
      block = re.match(r"blocks\.(\d+)\.", inner)
      behind = block is not None and int(block[1]) >= tower.depth
      return behind or re.match(BEHIND, inner) is not None
    return llava.DECODER.is_ignored(name, config.language)

  def their_name(self, ours: str) -> str:
    """What config.json calls a field, with the part that it is in."""
    part, _, field = ours.partition(".")
    if part == "language":
      return f"text_config.{families_language.LLAMA.their_name(field)}"
    if part in ("vision", "fused"):
      return f"timm_model_ids ({field} of {part})"
    return OWN.their_name(ours)

  def input_of(
    self, folder: pathlib.Path, config: VisionLanguageConfig
  ) -> ImagesAndText:
    """What makes its inputs; a part is None where the folder lacks it."""
    return ImagesAndText(
      Tokenizer.find(folder, config.language.vocabulary),
      prismatic_images.read(folder, config.channels),
      actions.of_folder(folder) if self.acts else None, image_second=True,
    )  # fmt: skip

  def read(
    self, whole: Json, names: Collection[str] = ()
  ) -> VisionLanguageConfig:
    """The configuration in a config.json."""
    del names
    problems = Problems("config.json")
    values: dict[str, Any] = {}
    encoders, language = [], None
    with problems.collect():
      values = OWN.read(whole, problems)
    problems.check()
    with problems.collect():
      encoders = read_encoders(whole, values["encoders"], values["fused"])
    with problems.collect():
      language = llava.read_language(whole)
    if self.acts:
      with problems.collect():
        actions.read(whole)
    problems.check()
    assert language is not None
    features = sum(tower.width for tower in encoders)
    hidden = 4 * features if values["fused"] else None
    projector = ProjectorConfig(
      language.width, hidden=hidden, layers=3 if values["fused"] else 2
    )
    return problems.build(
      VisionLanguageConfig,
      dict(
        vision=encoders[0], fused=encoders[1] if values["fused"] else None,
        projector=projector, language=language, ahead=True,
        image_token=values["image_token"],
      ),
    )  # fmt: skip

  def settle(
    self, config: VisionLanguageConfig, tensors: TensorFiles
  ) -> VisionLanguageConfig:
    """With an output matrix of its own where the file has one."""
    language = llava.DECODER.settle(config.language, tensors)
    return dataclasses.replace(config, language=language)


def read_encoders(
  whole: Json, names: Collection[str], fused: bool
) -> list[ViTConfig]:
  """The towers, one or two."""
  if len(names) != 1 + fused:
    raise fields.wrong(
      "timm_model_ids", list(names), f"{1 + fused} names, since"
      f" use_fused_vision_backbone={fused}",
    )  # fmt: skip
  every = zip(
    names, sides(whole, len(names)),
    each(whole, "timm_override_act_layers", len(names)),
    each(whole, "timm_model_args", len(names)), strict=True,
  )  # fmt: skip
  return [encoder(*one) for one in every]


PRISMATIC = {
  layout.name: layout
  for layout in (Prismatic(), Prismatic("OpenVLAForActionPrediction", True))
}
