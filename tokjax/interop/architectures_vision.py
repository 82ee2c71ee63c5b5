"""Classes of `transformers` for vision: family, table and head of each."""

import dataclasses
import pathlib
import re
from collections.abc import Collection
from typing import Any

from tokjax.interop import families_vision as families
from tokjax.interop import fields, labels, preprocessing_files, tables
from tokjax.interop.fields import Family, Json, Problems
from tokjax.interop.layout import Layout, prefix_of
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.tables import Row
from tokjax.models.vit import ViT, ViTConfig
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class Architecture(Layout):
  """A class of `transformers`.

  Attributes:
    name: of the class.
    family: how its config.json is written.
    rows: its table.
    prefixes: of the encoder's tensors; the first is written,
      all are read.
    classes: it has a classifier.
    pooler: it may have the encoder's pooler.
    projection: it has CLIP's projection.
    implied: our values that follow from the class.
    ignored: tensors (regular expression) that belong to other parts.
    written: it can be exported; a model with a text tower cannot.
  """

  name: str
  family: Family
  rows: tuple[Row, ...]
  prefixes: tuple[str, ...] = ("",)
  classes: bool = False
  pooler: bool = False
  projection: bool = False
  implied: Json = dataclasses.field(default_factory=dict)
  ignored: str = r".*position_ids"
  written: bool = True

  holds = ViTConfig

  def prefix(self, names: Collection[str]) -> str:
    """The prefix that a file's encoder has (the usual one if none fits)."""
    return prefix_of(names, self.prefixes, "embeddings.")

  def table(self, config: ViTConfig) -> tuple[Row, ...]:
    """The rows that a file of this class may have."""
    del config
    return self.rows

  def is_ignored(self, name: str, config: ViTConfig) -> bool:
    """Tensors of a text tower, buffers, and what only pre-training uses."""
    del config
    return re.fullmatch(self.ignored, name) is not None

  def their_name(self, ours: str) -> str:
    """What config.json calls a field of the configuration."""
    return self.family.their_name(ours)

  def build(self, config: ViTConfig, slots: Slots, dtype: Any) -> ViT:
    """The model."""
    return ViT(config, slots, dtype)

  def input_of(
    self, folder: pathlib.Path, config: ViTConfig
  ) -> Preprocessing | None:
    """The preprocessing of images, if the folder states one."""
    return preprocessing_files.read(folder, config.channels)

  def read(self, whole: Json, names: Collection[str]) -> ViTConfig:
    """The configuration in a config.json.

    The names of tensors show whether there is a pooler.
    """
    problems = Problems("config.json")
    values: dict[str, Any] = {}
    with problems.collect():
      part = whole
      if "vision_config" in whole:
        part = fields.mapping(whole, "vision_config")
        fields.refuse(whole, fields.QUANTISED, problems)
      values |= self.family.read(part, problems)
      values |= self.implied
      values |= self._heads(whole, part, names, problems)
    return problems.build(ViTConfig, values)

  def _heads(self, whole: Json, part: Json, names, problems) -> dict[str, Any]:
    """Which heads there are, and their sizes."""
    values: dict[str, Any] = {"num_classes": None}
    with problems.collect():
      if self.classes:
        values["num_classes"] = classes_of(whole)
      if self.projection:
        where = whole if "projection_dim" in whole else part
        read = fields.optional(fields.integer, 512)
        values["projection"] = read(where, "projection_dim")
    with problems.collect():
      if self.pooler and f"{self.prefix(names)}pooler.dense.weight" in names:
        read = fields.optional(fields.integer, part.get("hidden_size", 768))
        values["pooler"] = read(part, "pooler_output_size")
        fields.optional(fields.one_of({"tanh": "tanh"}))(part, "pooler_act")
    return values

  def write(self, config: ViTConfig) -> dict[str, Any]:
    """A config.json with all of a configuration that this class can hold."""
    whole = {"architectures": [self.name], **self.family.write(config)}
    if self.classes and config.num_classes is not None:
      whole |= labels.by_id(labels.unnamed(config.num_classes))
    if self.projection:
      whole["projection_dim"] = config.projection
    if self.pooler and config.pooler is not None:
      whole["pooler_output_size"] = config.pooler
    return whole


def classes_of(whole: Json) -> int:
  """Number of classes in a config.json; `transformers` leaves out a 2."""
  if whole.get("id2label") is not None:
    return len(fields.mapping(whole, "id2label"))
  return fields.optional(fields.integer, 2)(whole, "num_labels")


CLASSIFIER = tables.linear("head/classifier", "classifier")
TEACHER = (
  *tables.linear("head/classifier", "cls_classifier"),
  *tables.linear("head/distillation_classifier", "distillation_classifier"),
)
TEXT = r"text_model\..*|text_projection\..*|logit_.*|.*position_ids"
# For pre-training only.
MASK_TOKEN = r".*mask_token"
TOWER = ("vision_model.", "")

VISION = {
  architecture.name: architecture
  for architecture in (
    Architecture(
      "ViTForImageClassification",
      families.VIT,
      (*tables.VIT, *CLASSIFIER),
      ("vit.",),
      classes=True,
    ),
    Architecture("ViTModel", families.VIT, tables.VIT, pooler=True),
    Architecture(
      "DeiTForImageClassificationWithTeacher",
      families.DEIT,
      (*tables.VIT, *TEACHER),
      ("deit.",),
      classes=True,
    ),
    Architecture(
      "DeiTForImageClassification",
      families.DEIT,
      (*tables.VIT, *CLASSIFIER),
      ("deit.",),
      classes=True,
      implied={"distillation_head": False},
    ),
    Architecture("DeiTModel", families.DEIT, tables.VIT, pooler=True),
    Architecture("ViTMAEModel", families.MAE, tables.VIT),
    Architecture(
      "ViTMAEForPreTraining",
      families.MAE,
      tables.VIT,
      ("vit.",),
      ignored=r"decoder\..*",
      written=False,
    ),
    Architecture("CLIPVisionModel", families.CLIP, tables.CLIP, TOWER),
    Architecture(
      "CLIPVisionModelWithProjection",
      families.CLIP,
      tables.CLIP,
      TOWER,
      projection=True,
    ),
    Architecture(
      "CLIPModel",
      families.CLIP,
      tables.CLIP,
      TOWER,
      projection=True,
      ignored=TEXT,
      written=False,
    ),
    Architecture("SiglipVisionModel", families.SIGLIP, tables.SIGLIP, TOWER),
    Architecture(
      "SiglipModel",
      families.SIGLIP,
      tables.SIGLIP,
      TOWER,
      ignored=TEXT,
      written=False,
    ),
    Architecture(
      "Siglip2VisionModel", families.SIGLIP2, tables.SIGLIP2, TOWER
    ),
    Architecture(
      "Siglip2Model",
      families.SIGLIP2,
      tables.SIGLIP2,
      TOWER,
      ignored=TEXT,
      written=False,
    ),
    Architecture("Dinov2Model", families.DINO, tables.DINO, ignored=MASK_TOKEN),
    Architecture(
      "Dinov2WithRegistersModel",
      families.DINO_REGISTERS,
      tables.DINO,
      ignored=MASK_TOKEN,
    ),
  )
}
