"""Shapes of a model's parameters, as they follow from its configuration."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tokjax.interop.tensors import CheckpointError, Header
from tokjax.models import vlm_native
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.dense_vit import DenseViT, DenseViTConfig
from tokjax.models.native_patches import NativeResolutionConfig, Patches
from tokjax.models.vit import ViT, ViTConfig
from tokjax.models.vlm import Prompts, VisionLanguage
from tokjax.models.vlm_config import VisionLanguageConfig

Tower = ViTConfig | NativeResolutionConfig | DecoderConfig
Config = ViTConfig | DecoderConfig | VisionLanguageConfig | DenseViTConfig


@functools.lru_cache(maxsize=32)
def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the parameters of a configuration."""
  if isinstance(config, DecoderConfig) and config.depth > 1:
    # Blocks of a decoder are alike, and each takes long to trace.
    one, found = shapes_of(dataclasses.replace(config, depth=1)), {}
    for name, shape in one.items():
      within = name.removeprefix("block_0/")
      repeats = config.depth if within != name else 0
      found |= {f"block_{i}/{within}": shape for i in range(repeats)}
      if not repeats:
        found[name] = shape
    return found
  model, example = specimen(config)
  variables = jax.eval_shape(model.init, jax.random.key(0), example)
  params = variables["params"]
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  return {name: leaf.shape for name, leaf in flat.items()}


@functools.singledispatch
def specimen(config: Any) -> tuple[nn.Module, Any]:
  """The model of a configuration, and an input that initialises it."""
  raise TypeError(f"{type(config).__name__}: no model is known for it")


@specimen.register
def _(config: ViTConfig):
  shape = (1, *config.image_sides, config.channels)
  return ViT(config), jax.ShapeDtypeStruct(shape, jnp.float32)


@specimen.register
def _(config: DecoderConfig):
  return Decoder(config), jax.ShapeDtypeStruct((1, 2), jnp.int32)


@specimen.register
def _(config: VisionLanguageConfig):
  cfg, row = config.vision, jnp.zeros((1, 2), jnp.int32)
  if isinstance(cfg, NativeResolutionConfig):
    side = cfg.window or cfg.merge
    given = Patches(np.zeros((side**2, cfg.patch_features)), np.full(2, side))
    images = vlm_native.batch([given], cfg, 1, (side // cfg.merge) ** 2)
    return VisionLanguage(config), Prompts(
      row, row, row, row[0, :1], images, start=row, following=row[0, :1]
    )
  images = jnp.zeros((1, *cfg.image_sides, config.channels))
  return VisionLanguage(config), Prompts(row, row, row, row[0, :1], images)


@specimen.register
def _(config: DenseViTConfig):
  cfg = config.backbone
  shape = (1, *cfg.image_sides, cfg.channels)
  return DenseViT(config), jax.ShapeDtypeStruct(shape, jnp.float32)


def parts_of(config: Config | Tower) -> dict[str, Tower]:
  """The configurations that a configuration is made of."""
  if isinstance(config, VisionLanguageConfig):
    parts: dict[str, Tower] = {
      "vision": config.vision, "language": config.language
    }  # fmt: skip
    if config.fused is not None:
      parts["fused"] = config.fused
    return parts
  if isinstance(config, DenseViTConfig):
    return {"backbone": config.backbone}
  return {}


def sizes_of(config: Config | Tower) -> dict[str, int]:
  """The fields of a configuration that are an axis of some parameter."""
  if parts := parts_of(config):
    return {
      f"{part}.{name}": size
      for part, own in parts.items()
      for name, size in sizes_of(own).items()
    }
  names = ("width", "heads", "mlp_dim")
  if isinstance(config, DecoderConfig):
    names += ("vocabulary", "kv_heads", "head_dim")
    derived = {"heads": config.heads * config.features}
  elif isinstance(config, NativeResolutionConfig):
    names += ("channels", "patch_size", "frames")
    derived = {}
  else:
    assert isinstance(config, ViTConfig)
    names += ("channels", "patch_size", "registers", "pooler", "projection")
    names += ("num_classes",)
    derived = {"image_size": config.num_patches}
  return {n: getattr(config, n) or 0 for n in names} | derived


def check_sizes(
  config: Config,
  headers: Mapping[str, Header],
  stated_as: Callable[[str], str],
  source: str,
) -> None:
  """Refuses sizes that no tensor has, before anything of them is made.

  Shapes are compared tensor by tensor afterwards; but to know the model's own
  shapes takes time and memory that grow with the sizes.

  Raises:
    CheckpointError: lists every size beyond the largest axis of the tensors,
      and a depth beyond their number.
  """
  largest = max((n for h in headers.values() for n in h.shape), default=0)
  wrong = [
    f"{stated_as(name)} asks for an axis of {size}, but no tensor"
    f" has one longer than {largest}"
    for name, size in sizes_of(config).items()
    if size > largest
  ]
  if config.depth > len(headers):
    wrong.append(
      f"{stated_as('depth')}={config.depth}, but there are"
      f" {len(headers)} tensors"
    )
  if wrong:
    raise CheckpointError(f"{source}: " + "\n  ".join(wrong))
