"""Families of vision models: config.json as values of `ViTConfig`.

A family is all classes of one `model_type` of `transformers`; it states which
values its config.json holds, under which names, and which are implied.
"""

import math

from tokjax.interop import fields
from tokjax.interop.fields import Family, Field, Json

ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "quick_gelu": "quick_gelu",
}


def mlp_dim(part: Json, name: str, of: str = "hidden_size") -> int:
  """Width of the MLP, stated as a multiple of the model's."""
  ratio, width = fields.positive(part, name), part[of]
  if not fields.is_number(width):
    raise ValueError(f"{name}: cannot be used without {of}")
  if not math.isfinite(ratio * width):
    raise fields.wrong(name, ratio, f"small enough for {of}={width}")
  return int(ratio * width)


def image_side(part: Json, name: str) -> int:
  """Side of the image whose position table has this many patches."""
  patches = fields.integer(part, name)
  if math.isqrt(patches) ** 2 != patches:
    raise fields.wrong(name, patches, "a square number")
  return math.isqrt(patches) * fields.square(part, "patch_size")


def pool(part: Json, name: str) -> str:
  """SigLIP's attention pooling, or none."""
  return "map" if fields.flag(part, name) else "none"


SHARED = (
  Field("patch_size", "patch_size", fields.square),
  Field("channels", "num_channels", fields.integer),
  Field("width", "hidden_size", fields.integer),
  Field("depth", "num_hidden_layers", fields.depth),
  Field("heads", "num_attention_heads", fields.integer),
  fields.named("activation", "hidden_act", ACTIVATIONS),
  Field("epsilon", "layer_norm_eps", fields.positive),
)
IMAGE = Field("image_size", "image_size", fields.size)
MLP = Field("mlp_dim", "intermediate_size", fields.integer)
QKV_BIAS = Field("qkv_bias", "qkv_bias", fields.flag)
MLP_RATIO = Field(
  "mlp_dim",
  "mlp_ratio",
  mlp_dim,
  lambda dim, config: dim // config.width,
)
NUM_PATCHES = Field(
  "image_size",
  "num_patches",
  image_side,
  lambda size, config: config.num_patches,
)
USE_HEAD = Field(
  "pool",
  "vision_use_head",
  pool,
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
  ("use_swiglu_ffn",),
)
DINO_REGISTERS = Family(
  "dinov2_with_registers",
  (*DINO_FIELDS, Field("registers", "num_register_tokens", fields.natural)),
  {**DINO_DEFAULTS, "num_register_tokens": 4},
  {"layer_scale": True, "position_resize": "bicubic_antialias"},
  ("use_swiglu_ffn",),
)
