"""timm's VisionTransformer and its distilled variant, as an architecture.

A config.json of timm names an architecture (`vit_base_patch16_224`), from
which size and details follow, and may override them in `model_args`.
"""

import functools
import pathlib
import re
from collections.abc import Collection
from typing import Any

from tokjax.interop import (
  families_vision,
  fields,
  preprocessing_files,
  preprocessing_timm,
  tables,
)
from tokjax.interop.fields import Field, Json, Problems
from tokjax.interop.layout import Layout
from tokjax.interop.preprocessing import Preprocessing
from tokjax.models.vit import ViT, ViTConfig
from tokjax.slots import Slots

NAME = re.compile(
  r"(?P<family>vit|deit|deit3)_(?P<size>tiny|small|medium|base|large|huge)"
  r"(?P<distilled>_distilled)?_patch(?P<patch>\d+)"
  r"(_reg(?P<registers>\d+))?(?P<dino>_dinov2)?(_(?P<image>\d+))?"
  r"(_in21k)?"
)
# Width, depth, heads; the MLP is four times as wide.
SIZES = {
  "tiny": (192, 12, 3),
  "small": (384, 12, 6),
  "medium": (512, 12, 8),
  "base": (768, 12, 12),
  "large": (1024, 24, 16),
  "huge": (1280, 32, 16),
}
POOLS: dict[str, Any] = {"token": "class", "avg": "mean", "": "none"}
# Written so that timm makes layer scales; training changes their values.
SCALE = 1e-5
ACTIVATIONS = {name: name for name in ("gelu", "gelu_tanh", "quick_gelu")}


def classes(part: Json, name: str) -> int | None:
  """0: no classifier."""
  return fields.natural(part, name) or None


def mlp_dim(part: Json, name: str) -> int:
  """Width of the MLP, stated as a multiple of the model's."""
  return families_vision.mlp_dim(part, name, "embed_dim")


def head_norm(part: Json, name: str) -> str:
  """Absent: the norm is on pooled features where they are a mean."""
  pooled = fields.optional(fields.flag, part.get("global_pool") == "avg")
  return "pooled" if pooled(part, name) else "tokens"


def layer_scale(part: Json, name: str) -> bool:
  """The value initialises a new model; here it says that there are scales."""
  return bool(fields.optional(fields.number)(part, name))


def pool_name(value: str, config: ViTConfig) -> str | None:
  """None: a pooling that timm's class does not have."""
  del config
  return {ours: theirs for theirs, ours in POOLS.items()}.get(value)


def embeds_class(part: Json, name: str) -> bool:
  """Whether the position table has rows for the tokens in front."""
  return not fields.flag(part, name)


# Arguments of timm's model that can be followed, and their defaults.
FIELDS = (
  Field("image_size", "img_size", fields.size),
  Field("patch_size", "patch_size", fields.square),
  Field("channels", "in_chans", fields.integer),
  Field("num_classes", "num_classes", classes, lambda n, config: n or 0),
  Field("pool", "global_pool", fields.one_of(POOLS), pool_name),
  Field("width", "embed_dim", fields.integer),
  Field("depth", "depth", fields.depth),
  Field("heads", "num_heads", fields.integer),
  Field("mlp_dim", "mlp_ratio", mlp_dim, lambda n, config: n / config.width),
  Field("qkv_bias", "qkv_bias", fields.flag),
  Field(
    "layer_scale",
    "init_values",
    layer_scale,
    lambda scaled, config: SCALE if scaled else None,
  ),
  Field("class_token", "class_token", fields.flag),
  Field(
    "position_on_class",
    "no_embed_class",
    embeds_class,
    lambda embedded, config: not embedded,
  ),
  Field("registers", "reg_tokens", fields.natural),
  Field("pre_norm", "pre_norm", fields.flag),
  Field(
    "head_norm",
    "fc_norm",
    head_norm,
    lambda norm, config: norm == "pooled",
  ),
  Field("activation", "act_layer", fields.one_of(ACTIVATIONS)),
)
DEFAULTS: Json = {
  "in_chans": 3,
  "num_classes": 1000,
  "global_pool": "token",
  "mlp_ratio": 4.0,
  "qkv_bias": True,
  "init_values": None,
  "class_token": True,
  "no_embed_class": False,
  "reg_tokens": 0,
  "pre_norm": False,
  "fc_norm": None,
  "act_layer": "gelu",
}
NEEDED = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
KNOWN = {*DEFAULTS, *NEEDED}
# They change training or how images of other sizes are taken, not the model.
WITHOUT_EFFECT = {
  "dynamic_img_size", "drop_rate", "pos_drop_rate", "patch_drop_rate",
  "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init",
  "fix_init",
}  # fmt: skip


class Timm(Layout):
  """Tables and config.json of timm."""

  name = "timm"
  written = True
  holds = ViTConfig

  def prefix(self, names: Collection[str]) -> str:
    """None."""
    del names
    return ""

  def table(self, config: ViTConfig) -> tuple[tables.Row, ...]:
    """timm calls the final norm by what it acts on."""
    pooled = config.head_norm == "pooled"
    return (
      *tables.TIMM,
      *(tables.TIMM_POOLED_NORM if pooled else tables.TIMM_NORM),
    )

  def build(self, config: ViTConfig, slots: Slots, dtype: Any) -> ViT:
    """The model."""
    return ViT(config, slots, dtype)

  def input_of(
    self, folder: pathlib.Path, config: ViTConfig
  ) -> Preprocessing | None:
    """The preprocessing of images, if the folder states one."""
    return preprocessing_files.read(folder, config.channels)

  def their_name(self, ours: str) -> str:
    """The argument of timm's model."""
    return next((f.theirs for f in FIELDS if f.ours == ours), ours)

  def read(self, whole: Json, names: Collection[str]) -> ViTConfig:
    """The configuration in a config.json.

    The names of tensors show whether there is a distillation token.
    """
    problems = Problems("config.json")
    args: dict[str, Any] = {}
    with problems.collect():
      args = arguments(whole)
    problems.check()
    if unknown := sorted(set(args) - KNOWN - WITHOUT_EFFECT):
      problems.found.append(f"model_args {unknown} are not supported")
    args = {**DEFAULTS, **args}
    values = fields.read_fields(FIELDS, args, problems)
    registers = values.get("registers", 0) > 0
    embedded = values.get("position_on_class", True)
    values["position_on_registers"] = embedded and registers
    values["patch_bias"] = not values.get("pre_norm", False)
    return problems.build(
      functools.partial(
        ViTConfig,
        distillation_token="dist_token" in names,
        epsilon=1e-6,
        position_resize="bicubic_antialias",
      ),
      values,
    )

  def write(self, config: ViTConfig) -> dict[str, Any]:
    """The config.json of a configuration, with every argument stated."""
    args: dict[str, Any] = {}
    for field in FIELDS:
      args |= field.written(config)
    # timm obeys this one, not the one above `model_args`.
    pool, count = args["global_pool"], args.pop("num_classes")
    architecture = "vit_base_patch16_224"
    if config.distillation_token:
      # The distilled class takes no other pooling than this.
      architecture = "deit_base_distilled_patch16_224"
      args.pop("fc_norm")
    return {
      "architecture": architecture,
      "num_classes": count,
      "num_features": config.width,
      "global_pool": pool,
      "model_args": args,
      "pretrained_cfg": {
        "input_size": [config.channels, *config.image_sides],
        "num_classes": count,
      },
    }


def arguments(whole: Json) -> dict[str, Any]:
  """The arguments of timm's model: from the name, then from model_args."""
  name = fields.string(whole, "architecture")
  match = NAME.fullmatch(name)
  args = from_name(match) if match else {}
  published = preprocessing_timm.part_of(whole)
  if published.get("input_size") is not None:
    size = fields.input_size(published, "input_size")
    args |= {"in_chans": size[0], "img_size": size[1:]}
  for key in ("num_classes", "global_pool"):
    if key in whole:
      args[key] = whole[key]
  args |= fields.mapping(whole, "model_args")
  if missing := [key for key in NEEDED if key not in args]:
    raise ValueError(
      f"architecture {name!r} is not one of timm's plain ViT, DeiT, DeiT-III"
      f" or DINOv2 models, and model_args lacks {missing}"
    )
  return args


def from_name(match: re.Match[str]) -> dict[str, Any]:
  """What the name of an architecture says."""
  width, depth, heads = SIZES[match["size"]]
  args = {
    "embed_dim": width,
    "depth": depth,
    "num_heads": heads,
    "patch_size": int(match["patch"]),
    "img_size": int(match["image"] or 224),
    "reg_tokens": int(match["registers"] or 0),
  }
  if match["registers"]:
    args["no_embed_class"] = True
  if match["dino"]:
    args |= {"init_values": 1e-5, "img_size": 518}
  if match["family"] == "deit3":
    args |= {"init_values": 1e-6, "no_embed_class": True}
  return args
