"""Published model classes: each with its family, its table and its head."""

import dataclasses
import re
from typing import Any

from tokjax.interop import families_vision as families
from tokjax.interop import tables
from tokjax.interop.families_vision import Family, Json
from tokjax.interop.tables import Row
from tokjax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A class of `transformers`.

  Attributes:
    name: of the class.
    family: how its config.json is written.
    rows: its table.
    prefixes: what stands before the encoder's tensors; the first is written,
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

  def prefix(self, names) -> str:
    """The prefix that a file's encoder has (the usual one if none fits)."""
    for prefix in self.prefixes:
      if any(name.startswith(f"{prefix}embeddings.") for name in names):
        return prefix
    return self.prefixes[0]

  def table(self, config: ViTConfig) -> tuple[Row, ...]:
    """The rows that a file of this class may have."""
    del config
    return self.rows

  def is_ignored(self, name: str) -> bool:
    return re.fullmatch(self.ignored, name) is not None

  def read(self, whole: Json, names) -> ViTConfig:
    """The configuration in a config.json.

    Args:
      whole: config.json.
      names: of the tensors; a pooler is only visible there.

    Raises:
      ValueError: a value this model does not support.
    """
    part = {**self.family.defaults, **whole.get("vision_config", whole)}
    for key, value in self.family.refused.items():
      if part.get(key) == value:
        raise ValueError(f"config.json: {key}={value} is not supported")
    values: dict[str, Any] = {**self.family.implied, **self.implied}
    values["num_classes"] = classes_of(whole) if self.classes else None
    for field in self.family.fields:
      try:
        values[field.ours] = field.read(part[field.theirs], part)
      except ValueError as error:
        raise ValueError(f"config.json: {field.theirs}={error}") from error
    if self.projection:
      part = {"projection_dim": 512, **part}
      values["projection"] = whole.get("projection_dim", part["projection_dim"])
    if self.pooler and f"{self.prefix(names)}pooler.dense.weight" in names:
      values["pooler"] = part.get("pooler_output_size") or values["width"]
      if part.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"config.json: pooler_act={part['pooler_act']!r}")
    return ViTConfig(**values)

  def write(self, config: ViTConfig) -> dict[str, Any]:
    """A config.json with all of a configuration that this class can hold."""
    whole: dict[str, Any] = {
      "architectures": [self.name],
      "model_type": self.family.model_type,
    }
    for field in self.family.fields:
      value = getattr(config, field.ours)
      whole[field.theirs] = field.write(value, config)
    if self.classes and config.num_classes is not None:
      labels = [f"LABEL_{i}" for i in range(config.num_classes)]
      whole["id2label"] = {str(i): name for i, name in enumerate(labels)}
      whole["label2id"] = {name: i for i, name in enumerate(labels)}
    if self.projection:
      whole["projection_dim"] = config.projection
    if self.pooler and config.pooler is not None:
      whole["pooler_output_size"] = config.pooler
    return whole


def classes_of(whole: Json) -> int:
  """Number of classes in a config.json; `transformers` leaves out a 2."""
  if "id2label" in whole:
    return len(whole["id2label"])
  return whole.get("num_labels", 2)


CLASSIFIER = tables.linear("head/classifier", "classifier")
TEACHER = (
  *tables.linear("head/classifier", "cls_classifier"),
  *tables.linear("head/distillation_classifier", "distillation_classifier"),
)
TEXT = r"text_model\..*|text_projection\..*|logit_.*|.*position_ids"
# For pre-training only.
MASK_TOKEN = r".*mask_token"
VISION = ("vision_model.", "")

ARCHITECTURES = {
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
    Architecture("CLIPVisionModel", families.CLIP, tables.CLIP, VISION),
    Architecture(
      "CLIPVisionModelWithProjection",
      families.CLIP,
      tables.CLIP,
      VISION,
      projection=True,
    ),
    Architecture(
      "CLIPModel",
      families.CLIP,
      tables.CLIP,
      VISION,
      projection=True,
      ignored=TEXT,
      written=False,
    ),
    Architecture("SiglipVisionModel", families.SIGLIP, tables.SIGLIP, VISION),
    Architecture(
      "SiglipModel",
      families.SIGLIP,
      tables.SIGLIP,
      VISION,
      ignored=TEXT,
      written=False,
    ),
    Architecture(
      "Siglip2VisionModel", families.SIGLIP2, tables.SIGLIP2, VISION
    ),
    Architecture(
      "Siglip2Model",
      families.SIGLIP2,
      tables.SIGLIP2,
      VISION,
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
