"""Models with weights to a folder, as `transformers` or timm read it."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokjax.interop import (
  convert,
  files,
  learned_parts,
  preprocessing_files,
  preprocessing_timm,
)
from tokjax.interop import labels as labels_lib
from tokjax.interop.layout import Layout
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.pretrained import LAYOUTS, open_folder
from tokjax.interop.timm import Timm
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.vit import ViTConfig


def layout_for(
  config: ViTConfig | DecoderConfig, source: str | pathlib.Path
) -> str | None:
  """The layout of a checkpoint, for `save`; None: it cannot hold the model.

  Args:
    config: of the model to write.
    source: folder, GGUF file or hub id of the checkpoint.
  """
  layout = open_folder(files.locate(source))[0]
  if not layout.written or differences(config, layout):
    return None
  return layout.name


def save(
  folder: str | pathlib.Path,
  config: ViTConfig | DecoderConfig,
  params: Mapping[str, Any],
  *,
  layout: str | None = None,
  preprocessing: Preprocessing | None = None,
  labels: Sequence[str] = (),
  recipe: tuple[str, Mapping[str, Any]] | None = None,
  dtype: Any = None,
  shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes config.json and safetensors as `transformers` or timm read them.

  The resize of the position table is the one thing that is not written: each
  library has its own, used only for images of another size. Every file appears
  when it is complete.

  Args:
    folder: made if absent; tensor files of an earlier model in it are replaced.
    config: the architecture.
    params: its parameters.
    layout: one of `layouts()` that can be written; None: the first that can
      hold this model.
    preprocessing: written next to it, if given.
    labels: names of the classes; (): they have none.
    recipe: name and options of the recipe that the model was built with. They
      go to `tokjax.json`, and the parameters that the recipe added to
      `tokjax.safetensors`; `load(folder, slots=recipes.get(name, **options))`
      reads both, see `recipe_of`. None: all parameters are those of `config`.
    dtype: of the tensors; None: as they are.
    shard_bytes: a larger model is written as shards with an index.

  Raises:
    ValueError: no such layout, or it cannot hold this model; says why. Or
      labels of another number than there are classes.
    CheckpointError: lists every parameter that does not fit `config`.
  """
  name = layout or choose_layout(config)
  target = LAYOUTS.get(name)
  if target is None or not target.written:
    raise ValueError(f"layout={name!r}: must be one of {', '.join(writable())}")
  if wrong := differences(config, target):
    raise ValueError(f"layout={name!r} cannot hold {', '.join(wrong)}")
  whole, rest = None, {}
  if recipe is not None:
    whole = learned_parts.note(*recipe)
    params, rest = learned_parts.split(params, config)
    if dtype is not None:
      rest = {name: x.astype(dtype) for name, x in rest.items()}
  found = convert.entries(target.table(config), config, target.prefix(()))
  tensors = convert.write_tensors(params, found, config, dtype)
  configs = config_files(target, config, preprocessing, labels)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_tensors(folder, tensors, shard_bytes)
  for file, written in configs.items():
    files.write_json(folder / file, written)
  learned_parts.write(folder, whole, rest)


def config_files(
  target: Layout,
  config: ViTConfig | DecoderConfig,
  value: Preprocessing | None,
  labels: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
  """config.json and, where that is another file, the preprocessing."""
  whole = target.write(config)
  if labels:
    count = getattr(config, "num_classes", None)
    if len(labels) != count:
      raise ValueError(
        f"labels: {len(labels)} names for a model of {count} classes"
      )
    whole |= (
      {"label_names": list(labels)}
      if isinstance(target, Timm)
      else labels_lib.by_id(labels)
    )
  if value is None:
    return {"config.json": whole}
  if isinstance(target, Timm):
    whole["pretrained_cfg"] |= preprocessing_timm.to_timm(value)
    return {"config.json": whole}
  published = preprocessing_files.to_hf(value)
  return {preprocessing_files.HF_FILE: published, "config.json": whole}


def writable() -> tuple[str, ...]:
  """Layouts that can be written."""
  return tuple(name for name, layout in LAYOUTS.items() if layout.written)


def choose_layout(config: ViTConfig | DecoderConfig) -> str:
  """The first layout that can hold a configuration."""
  for name in writable():
    if not differences(config, LAYOUTS[name]):
      return name
  known = [n for n in writable() if isinstance(config, LAYOUTS[n].holds)]
  raise ValueError(
    f"no layout can hold this model; name one of {', '.join(known)} to see why"
    " not"
  )


def differences(config: ViTConfig | DecoderConfig, layout: Layout) -> list[str]:
  """What would be another value if a layout's reader read what it writes."""
  if not isinstance(config, layout.holds):
    return [f"a {type(config).__name__}"]
  found = convert.matches(layout.table(config), config, layout.prefix(()))
  names = {entry.theirs for entry in found}
  try:
    back = layout.resolved(layout.read(layout.write(config), names))
  except (KeyError, ValueError) as error:
    return [f"this model ({error})"]
  config = layout.resolved(config)
  return [
    f"{field.name}={getattr(config, field.name)!r}"
    f" (it means {getattr(back, field.name)!r})"
    for field in dataclasses.fields(config)
    if field.name != "position_resize"
    and getattr(back, field.name) != getattr(config, field.name)
  ]
