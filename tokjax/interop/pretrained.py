"""Pretrained models: a folder or hub id to a model with weights."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tokjax.interop import (
  convert,
  fields,
  files,
  gguf_models,
  learned_parts,
  onnx_models,
)
from tokjax.interop import labels as labels_lib
from tokjax.interop.architectures_language import LANGUAGE
from tokjax.interop.architectures_vision import VISION
from tokjax.interop.internvl import INTERNVL
from tokjax.interop.layout import Layout
from tokjax.interop.llava import LLAVA
from tokjax.interop.model_shapes import Config, check_sizes
from tokjax.interop.prismatic import PRISMATIC
from tokjax.interop.qwen_vl import QWEN_VL
from tokjax.interop.timm import Timm
from tokjax.slots import Slots

PLAIN = Slots()
LAYOUTS: dict[str, Layout] = {
  **VISION, **LANGUAGE, **LLAVA, **QWEN_VL, **INTERNVL, **PRISMATIC,
  Timm.name: Timm(),
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
  vision tower becomes a `ViT`, a language model a `Decoder`, LLaVA,
  Qwen-VL, InternVL and OpenVLA a `VisionLanguage`; an ONNX graph a `DenseViT`.

  Args:
    source: folder with config.json and safetensors, a GGUF file of a language
      model, an ONNX file of a dense one (see `onnx_models`), or a hub id.
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
    The model, its parameters, and what makes its inputs. `ViT`, `DenseViT`: a
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
  check_sizes(own, tensors.headers, layout.stated_as, str(source))
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
  """Layout, configuration and tensors of a folder or file."""
  if folder.suffix == files.GGUF and not folder.is_dir():
    return gguf_models.open_file(folder)
  if folder.suffix == files.ONNX and not folder.is_dir():
    return onnx_models.open_file(folder)
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
