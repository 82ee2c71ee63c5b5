"""Pretrained models: a folder or hub id to a `ViT` with weights, and back."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tokjax.interop import convert, files, preprocessing
from tokjax.interop.architectures import ARCHITECTURES, Architecture
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.timm import Timm
from tokjax.models.vit import ViT, ViTConfig
from tokjax.slots import Slots

PLAIN = Slots()
LAYOUTS: dict[str, Architecture | Timm] = {**ARCHITECTURES, Timm.name: Timm()}


def layouts() -> tuple[str, ...]:
  """Names of what can be read: classes of `transformers`, and "timm"."""
  return tuple(LAYOUTS)


def load(
  source: str | pathlib.Path,
  *,
  slots: Slots = PLAIN,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  revision: str | None = None,
  **overrides: Any,
) -> tuple[ViT, dict[str, Any], Preprocessing | None]:
  """A published model, built with slots.

  Args:
    source: folder with config.json and safetensors, or a hub id.
    slots: the recipe.
    dtype: of activations.
    param_dtype: of parameters; None: as stored.
    revision: branch, tag or commit on the hub.
    **overrides: fields of `ViTConfig` to change. `image_size` interpolates the
      position table, `num_classes=None` (or `pooler`, `projection`) leaves
      that head out; what changes other shapes is an error.

  Returns:
    The model, its parameters (`model.apply({"params": params}, images)`) and
    the preprocessing, None if the folder does not state it.

  Raises:
    FileNotFoundError: no such folder, hub id or file.
    ValueError: a config.json that this model cannot follow.
    CheckpointError: lists every tensor that does not fit.
  """
  folder = files.locate(source, revision)
  layout, own, tensors = open_folder(folder)
  prefix = layout.prefix(tensors.headers)
  params = convert.read_params(
    tensors.headers,
    tensors.read,
    convert.entries(layout.table(own), own, prefix),
    own,
    ignored=layout.is_ignored,
    dtype=param_dtype,
    source=str(source),
  )
  config = with_overrides(own, overrides)
  if config != own:
    params = convert.adapt(params, own, config, str(source))
  return ViT(config, slots, dtype), params, preprocessing.read(folder)


def config_from(
  source: str | pathlib.Path, *, revision: str | None = None
) -> ViTConfig:
  """The architecture of a folder or hub id, without reading its tensors."""
  return open_folder(files.locate(source, revision))[1]


def open_folder(folder: pathlib.Path):
  """Layout, configuration and tensor files of a folder."""
  whole = files.read_json(folder / "config.json")
  names = ["timm"] if "architecture" in whole else whole.get("architectures")
  known = [name for name in names or [] if name in LAYOUTS]
  if not known:
    raise ValueError(
      f"{folder}: config.json names {names or 'no architectures'}; those that"
      f" can be read are {', '.join(LAYOUTS)}"
    )
  layout, tensors = LAYOUTS[known[0]], files.TensorFiles(folder)
  return layout, layout.read(whole, tensors.headers), tensors


def with_overrides(config: ViTConfig, overrides: Mapping[str, Any]):
  """A configuration with some fields changed."""
  fields = [field.name for field in dataclasses.fields(config)]
  if unknown := [name for name in overrides if name not in fields]:
    raise TypeError(
      f"load() has no option {unknown[0]!r}; beside its own, the fields of"
      f" ViTConfig: {', '.join(fields)}"
    )
  return dataclasses.replace(config, **overrides)


def save(
  folder: str | pathlib.Path,
  config: ViTConfig,
  params: Mapping[str, Any],
  *,
  layout: str | None = None,
  preprocessing: Preprocessing | None = None,
  dtype: Any = None,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes config.json and safetensors as `transformers` or timm read them.

  The resize of the position table is the one thing that is not written: each
  library has its own, used only for images of another size.

  Args:
    folder: made if absent; tensor files of an earlier model in it are replaced.
    config: the architecture.
    params: its parameters.
    layout: one of `layouts()`; None: the first that can hold this model.
    preprocessing: written beside it, if given.
    dtype: of the tensors; None: as they are.
    shard_bytes: a larger model is written as shards with an index.

  Raises:
    ValueError: no such layout, or it cannot hold this model; says why.
    CheckpointError: lists every parameter that does not fit `config`.
  """
  name = layout or choose_layout(config)
  target = LAYOUTS.get(name)
  if target is None or not target.written:
    raise ValueError(f"layout={name!r}: must be one of {', '.join(writable())}")
  if wrong := differences(config, target):
    raise ValueError(f"layout={name!r} cannot hold {', '.join(wrong)}")
  found = convert.entries(target.table(config), config, target.prefix(()))
  tensors = convert.write_tensors(params, found, config, dtype)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_tensors(folder, tensors, shard_bytes)
  write_configs(folder, target, config, preprocessing)


def write_configs(folder, target, config, value: Preprocessing | None):
  """Writes config.json and, where that is another file, the preprocessing."""
  whole = target.write(config)
  if value is not None and isinstance(target, Timm):
    whole["pretrained_cfg"] |= preprocessing.to_timm(value)
  elif value is not None:
    files.write_json(folder / preprocessing.HF_FILE, preprocessing.to_hf(value))
  files.write_json(folder / "config.json", whole)


def writable() -> tuple[str, ...]:
  """Layouts that can be written."""
  return tuple(name for name, layout in LAYOUTS.items() if layout.written)


def choose_layout(config: ViTConfig) -> str:
  """The first layout that can hold a configuration."""
  for name in writable():
    if not differences(config, LAYOUTS[name]):
      return name
  raise ValueError(
    "no layout can hold this model; name one of"
    f" {', '.join(writable())} to see why not"
  )


def differences(config: ViTConfig, layout: Architecture | Timm) -> list[str]:
  """What would be another value if a layout's reader read what it writes."""
  found = convert.matches(layout.table(config), config, layout.prefix(()))
  names = {entry.theirs for entry in found}
  try:
    back = layout.read(layout.write(config), names)
  except (KeyError, ValueError) as error:
    return [f"this model ({error})"]
  return [
    f"{field.name}={getattr(config, field.name)!r}"
    f" (it means {getattr(back, field.name)!r})"
    for field in dataclasses.fields(config)
    if field.name != "position_resize"
    and getattr(back, field.name) != getattr(config, field.name)
  ]
