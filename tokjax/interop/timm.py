"""timm's VisionTransformer and its distilled variant, as an architecture.

A config.json of timm names an architecture (`vit_base_patch16_224`), from
which size and details follow, and may override them in `model_args`.
"""

import re
from collections.abc import Mapping
from typing import Any

from tokjax.interop import tables
from tokjax.models.vit import ViTConfig

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
# Arguments of timm's model that this importer understands.
KNOWN = {
  "img_size", "patch_size", "in_chans", "num_classes", "global_pool",
  "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values",
  "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm",
  "act_layer",
}  # fmt: skip


class Timm:
  """Tables and config.json of timm; the interface of `Architecture`."""

  name = "timm"
  written = True

  def prefix(self, names) -> str:
    del names
    return ""

  def is_ignored(self, name: str) -> bool:
    del name
    return False

  def table(self, config: ViTConfig) -> tuple[tables.Row, ...]:
    """timm calls the final norm by what it acts on."""
    pooled = config.head_norm == "pooled"
    return (
      *tables.TIMM,
      *(tables.TIMM_POOLED_NORM if pooled else tables.TIMM_NORM),
    )

  def read(self, whole: Mapping[str, Any], names) -> ViTConfig:
    """The configuration in a config.json.

    Args:
      whole: config.json.
      names: of the tensors; distillation is visible there.

    Raises:
      ValueError: an architecture or argument that is not supported.
    """
    args: dict[str, Any] = arguments(whole)
    if unknown := sorted(set(args) - KNOWN):
      raise ValueError(f"config.json: model_args {unknown} are not supported")
    pool = args.get("global_pool", "token")
    if pool not in POOLS:
      raise ValueError(
        f"config.json: global_pool={pool!r}: must be one of {sorted(POOLS)}"
      )
    pooled = args.get("fc_norm")
    pooled = pool == "avg" if pooled is None else pooled
    width, pre_norm = args["embed_dim"], args.get("pre_norm", False)
    return ViTConfig(
      image_size=args["img_size"],
      patch_size=args["patch_size"],
      channels=args.get("in_chans", 3),
      width=width,
      depth=args["depth"],
      heads=args["num_heads"],
      mlp_dim=int(width * args.get("mlp_ratio", 4.0)),
      class_token=args.get("class_token", True),
      distillation_token="dist_token" in names,
      registers=args.get("reg_tokens", 0),
      pool=POOLS[pool],
      head_norm="pooled" if pooled else "tokens",
      pre_norm=pre_norm,
      patch_bias=not pre_norm,
      qkv_bias=args.get("qkv_bias", True),
      position_on_class=not args.get("no_embed_class", False),
      num_classes=args.get("num_classes", 1000) or None,
      activation=args.get("act_layer", "gelu"),
      epsilon=1e-6,
      layer_scale=bool(args.get("init_values")),
      position_resize="bicubic_antialias",
    )

  def write(self, config: ViTConfig) -> dict[str, Any]:
    """The config.json of a configuration, with every argument stated."""
    pool = {ours: theirs for theirs, ours in POOLS.items()}.get(config.pool)
    args = {
      "img_size": config.image_size,
      "patch_size": config.patch_size,
      "in_chans": config.channels,
      "embed_dim": config.width,
      "depth": config.depth,
      "num_heads": config.heads,
      "mlp_ratio": config.mlp_dim / config.width,
      "qkv_bias": config.qkv_bias,
      # The value initialises a new model; here it says that there are scales.
      "init_values": 1e-5 if config.layer_scale else None,
      "class_token": config.class_token,
      "no_embed_class": not config.position_on_class,
      "reg_tokens": config.registers,
      "pre_norm": config.pre_norm,
      "act_layer": config.activation,
      # timm obeys this one, not the one above `model_args`.
      "global_pool": pool,
    }
    if config.distillation_token:
      # The distilled class takes no other pooling than this.
      architecture = "deit_base_distilled_patch16_224"
    else:
      architecture = "vit_base_patch16_224"
      args["fc_norm"] = config.head_norm == "pooled"
    side = config.image_size
    return {
      "architecture": architecture,
      "num_classes": config.num_classes or 0,
      "num_features": config.width,
      "global_pool": pool,
      "model_args": args,
      "pretrained_cfg": {
        "input_size": [config.channels, side, side],
        "num_classes": config.num_classes or 0,
      },
    }


def arguments(whole: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments of timm's model: from the name, then from model_args."""
  name = whole["architecture"]
  match = NAME.fullmatch(name)
  args = from_name(match) if match else {}
  size = whole.get("pretrained_cfg", {}).get("input_size")
  if size:
    args["in_chans"] = size[0]
    args["img_size"] = _side(size[1:])
  for key in ("num_classes", "global_pool"):
    if key in whole:
      args[key] = whole[key]
  args |= whole.get("model_args") or {}
  needed = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
  if missing := [key for key in needed if key not in args]:
    raise ValueError(
      f"config.json: architecture {name!r} is not one of timm's plain ViT,"
      f" DeiT, DeiT-III or DINOv2 models, and model_args lacks {missing}"
    )
  for key in ("img_size", "patch_size"):
    args[key] = _side(args[key])
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


def _side(value: Any) -> int:
  sides = value if isinstance(value, list | tuple) else (value, value)
  if len(set(sides)) != 1:
    raise ValueError(f"config.json: {value}: images must be square")
  return sides[0]
