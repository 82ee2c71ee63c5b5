"""Families of published models: config.json as values of `ViTConfig`.

A family is all classes of one `model_type` of `transformers`; it states which
values its config.json holds, under which names, and which are implied.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from tokjax.models.vit import ViTConfig

ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "quick_gelu": "quick_gelu",
}
Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Field:
  """One value of a config.json.

  Attributes:
    ours, theirs: its names.
    read: `(their value, the whole config.json) -> ours`.
    write: `(our value, the whole configuration) -> theirs`.
  """

  ours: str
  theirs: str
  read: Callable[[Any, Json], Any] = lambda value, whole: value
  write: Callable[[Any, ViTConfig], Any] = lambda value, whole: value


def square(value: Any, whole: Json) -> int:
  """A side given as a number or as two equal ones."""
  del whole
  sides = value if isinstance(value, list | tuple) else (value, value)
  if len(set(sides)) != 1:
    raise ValueError(f"{value}: images and patches must be square")
  return sides[0]


def activation(value: str, whole: Json) -> str:
  """The activation a name stands for in `transformers`."""
  del whole
  if value not in ACTIVATIONS:
    raise ValueError(f"{value!r}: must be one of {sorted(ACTIVATIONS)}")
  return ACTIVATIONS[value]


def activation_name(value: str, whole: ViTConfig) -> str:
  """The name of an activation in `transformers`."""
  del whole
  return {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[value]


SHARED = (
  Field("patch_size", "patch_size", square),
  Field("channels", "num_channels"),
  Field("width", "hidden_size"),
  Field("depth", "num_hidden_layers"),
  Field("heads", "num_attention_heads"),
  Field("activation", "hidden_act", activation, activation_name),
  Field("epsilon", "layer_norm_eps"),
)
IMAGE = Field("image_size", "image_size", square)
MLP = Field("mlp_dim", "intermediate_size")
QKV_BIAS = Field("qkv_bias", "qkv_bias")
MLP_RATIO = Field(
  "mlp_dim",
  "mlp_ratio",
  lambda ratio, whole: int(ratio * whole["hidden_size"]),
  lambda dim, config: dim // config.width,
)
NUM_PATCHES = Field(
  "image_size",
  "num_patches",
  lambda n, whole: math.isqrt(n) * whole["patch_size"],
  lambda size, config: config.num_patches,
)
USE_HEAD = Field(
  "pool",
  "vision_use_head",
  lambda use, whole: "map" if use else "none",
  lambda pool, config: pool == "map",
)

BASE = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_channels": 3,
  "image_size": 224,
  "patch_size": 16,
  "intermediate_size": 3072,
}
VIT_DEFAULTS = {
  **BASE,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "qkv_bias": True,
}
CLIP_DEFAULTS = {
  **BASE,
  "patch_size": 32,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
SIGLIP_DEFAULTS = {
  **BASE,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
  "vision_use_head": True,
}
DINO_DEFAULTS = {
  **VIT_DEFAULTS,
  "layer_norm_eps": 1e-6,
  "mlp_ratio": 4,
}


@dataclasses.dataclass(frozen=True)
class Family:
  """How the classes of one `model_type` write their config.json.

  Attributes:
    model_type: as `transformers` calls it.
    fields: the values read and written.
    defaults: those that config.json may leave out.
    implied: our values that follow from the family.
    refused: values of config.json that this model does not have.
  """

  model_type: str
  fields: tuple[Field, ...]
  defaults: Json
  implied: Json
  refused: Json = dataclasses.field(default_factory=dict)


VIT_FIELDS = (*SHARED, IMAGE, MLP, QKV_BIAS)
VIT = Family("vit", VIT_FIELDS, VIT_DEFAULTS, {})
DEIT = Family("deit", VIT_FIELDS, VIT_DEFAULTS, {"distillation_token": True})
MAE = Family("vit_mae", VIT_FIELDS, VIT_DEFAULTS, {"pool": "mean"})
CLIP = Family(
  "clip_vision_model",
  (*SHARED, IMAGE, MLP),
  CLIP_DEFAULTS,
  {"head_norm": "pooled", "pre_norm": True, "patch_bias": False},
)
SIGLIP = Family(
  "siglip_vision_model",
  (*SHARED, IMAGE, MLP, USE_HEAD),
  SIGLIP_DEFAULTS,
  {"class_token": False},
)
SIGLIP2 = Family(
  "siglip2_vision_model",
  (*SHARED, NUM_PATCHES, MLP, USE_HEAD),
  {**SIGLIP_DEFAULTS, "num_patches": 256},
  {"class_token": False, "position_resize": "bilinear_antialias"},
)
DINO_FIELDS = (*SHARED, IMAGE, MLP_RATIO, QKV_BIAS)
DINO = Family(
  "dinov2",
  DINO_FIELDS,
  {**DINO_DEFAULTS, "patch_size": 14},
  {"layer_scale": True},
  {"use_swiglu_ffn": True},
)
DINO_REGISTERS = Family(
  "dinov2_with_registers",
  (*DINO_FIELDS, Field("registers", "num_register_tokens")),
  {**DINO_DEFAULTS, "num_register_tokens": 4},
  {"layer_scale": True, "position_resize": "bicubic_antialias"},
  {"use_swiglu_ffn": True},
)
