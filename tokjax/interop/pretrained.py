"""Pretrained models: a folder or hub id to a model with weights, and back."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from tokjax.interop import (
  convert,
  fields,
  files,
  gguf_models,
  learned_parts,
  preprocessing_files,
  preprocessing_timm,
)
from tokjax.interop import labels as labels_lib
from tokjax.interop.architectures_language import LANGUAGE
from tokjax.interop.architectures_vision import VISION
from tokjax.interop.convert import Config
from tokjax.interop.layout import Layout
from tokjax.interop.llava import LLAVA
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.timm import Timm
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.vit import ViTConfig
from tokjax.slots import Slots

PLAIN = Slots()
LAYOUTS: dict[str, Layout] = {
  **VISION, **LANGUAGE, **LLAVA, Timm.name: Timm(),
}  # fmt: skip


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
) -> tuple[Any, dict[str, Any], Any]:
  """A published model of any kind, built with slots.

  `architectures` of config.json (timm: `architecture`) says what it is: a
  vision tower becomes a `ViT`, a language model a `Decoder`, LLaVA a
  `VisionLanguage`.

  Args:
    source: folder with config.json and safetensors, a GGUF file of a language
      model, or a hub id.
    slots: the recipe. Parameters of its own are read from the folder if it was
      exported with them, see `save`; otherwise they are not among the result.
    dtype: of activations (of a language model also of caches).
    param_dtype: of parameters; None: as stored.
    revision: branch, tag or commit on the hub.
    **overrides: fields of the model's configuration to change.
      `image_size` interpolates the position table, `num_classes=None` (or
      `pooler`, `projection`) leaves that head out; what changes other shapes
      is an error.

  Returns:
    The model, its parameters, and what makes its inputs. `ViT`: a
    `Preprocessing` of images, for `model.apply({"params": params}, images)`;
    None if the folder does not state it. `Decoder`: a `Tokenizer`, for
    `model.apply({"params": params}, tokens)`; None if the folder has no
    tokenizer.json, or the GGUF file no vocabulary. `VisionLanguage`: both, as
    `ImagesAndText`.

  Raises:
    FileNotFoundError: no such folder, hub id or file.
    ConfigError: a JSON file that this model cannot follow; lists all faults.
      Like CheckpointError it is a ValueError.
    CheckpointError: lists every tensor that does not fit or holds values that
      are not finite, or names a file that is damaged or may not be opened.
    ValueError: a file that is not JSON; a tokenizer with ids beyond the
      embedding; a recipe that this model cannot carry out.
  """
  folder = files.locate(source, revision)
  layout, own, tensors = open_folder(folder)
  convert.check_sizes(own, tensors.headers, layout.stated_as, str(source))
  config = with_overrides(own, overrides)
  # Before the tensors, which take time and memory.
  model = layout.build(config, slots, dtype)
  inputs = layout.input_of(folder, own)
  params = convert.read_params(
    tensors.headers,
    tensors.read,
    layout.entries(own, tensors.headers),
    own,
    ignored=lambda name: layout.is_ignored(name, own),
    dtype=param_dtype,
    source=str(source),
  )
  if config != own:
    params = convert.adapt(params, own, config, str(source))
  params = learned_parts.add(folder, model, params, param_dtype)
  return model, params, inputs


def config_from(
  source: str | pathlib.Path, *, revision: str | None = None
) -> Any:
  """The `ViTConfig` or `DecoderConfig` of a folder, GGUF file or hub id.

  Tensors are not read; except that a tied embedding is compared with the
  output matrix, if the folder has one.
  """
  return open_folder(files.locate(source, revision))[1]


def inputs_of(
  source: str | pathlib.Path, *, revision: str | None = None
) -> Any:
  """What makes a model's inputs, as `load` returns it; no tensor is read."""
  folder = files.locate(source, revision)
  layout, own, _ = open_folder(folder)
  return layout.input_of(folder, own)


def open_folder(folder: pathlib.Path) -> tuple[Layout, Any, Any]:
  """Layout, configuration and tensors of a folder or GGUF file."""
  if folder.suffix == files.GGUF and not folder.is_dir():
    return gguf_models.open_file(folder)
  whole = files.read_json(folder / "config.json")
  names = ("timm",)
  if "architecture" not in whole:
    try:
      names = fields.optional(fields.strings, ())(whole, "architectures")
    except ValueError as error:
      source = f"{folder}: config.json"
      raise fields.ConfigError(source, [str(error)]) from error
  known = [name for name in names if name in LAYOUTS]
  if not known:
    raise ValueError(
      f"{folder}: config.json names {list(names) or 'no architectures'}"
      f" (model_type={whole.get('model_type')!r}), which is no language model"
      f" and no vision model that can be read; those are {', '.join(LAYOUTS)}"
    )
  layout, tensors = LAYOUTS[known[0]], files.TensorFiles(folder)
  config = layout.read(whole, tensors.headers)
  return layout, layout.settle(config, tensors), tensors


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Any:
  """A configuration with some fields changed."""
  names = [field.name for field in dataclasses.fields(config)]
  if unknown := [name for name in overrides if name not in names]:
    raise TypeError(
      f"load() has no option {unknown[0]!r}; next to its own, the fields of"
      f" {type(config).__name__}: {', '.join(names)}"
    )
  return dataclasses.replace(config, **overrides)


def labels_of(
  source: str | pathlib.Path, *, revision: str | None = None
) -> tuple[str, ...]:
  """Names of a checkpoint's classes, in the order of its logits.

  Args:
    source: folder or hub id.
    revision: branch, tag or commit on the hub.

  Returns:
    (): it does not name them.
  """
  folder = files.locate(source, revision)
  if not folder.is_dir():
    return ()
  whole = files.read_json(folder / "config.json")
  with fields.problems_of(f"{folder}: config.json"):
    return labels_lib.read(whole)


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
