"""Recipes next to a published checkpoint: two files in its folder.

`tokjax.json` names the recipe with its options, `tokjax.safetensors` holds the
parameters that the recipe adds to the model, under our names. Other libraries
read the folder as the plain model; `load(folder, slots=...)` adds the
parameters.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tokjax import budgets
from tokjax.interop import files, model_shapes
from tokjax.interop.model_shapes import Config
from tokjax.interop.tensors import (
  Header,
  cast,
  check,
  dtype_of,
  is_finite,
  not_finite,
  report,
)
from tokjax.models.decoder import layers_of
from tokjax.models.decoder_block import attend_of, cache_of
from tokjax.models.decoder_config import DecoderConfig
from tokjax.slots import Slots, parameters

TENSORS, NOTE = "tokjax.safetensors", "tokjax.json"
FORMAT = "tokjax recipe 1"
# An entry of an option whose value is one of `tokjax.budgets`.
BUDGET = "budget"
# So long that reductions with parameters act on a prompt.
PROMPT = 64


def split(
  params: Mapping[str, Any], config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Parameters of the plain model, and the others by name."""
  flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
  own = model_shapes.shapes_of(config)
  plain = {name: x for name, x in flat.items() if name in own}
  rest = {name: x for name, x in flat.items() if name not in own}
  return traverse_util.unflatten_dict(plain, sep="/"), rest


def note(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """What `tokjax.json` says.

  Args:
    name: of the recipe.
    options: its arguments: plain values, and budgets of `tokjax.budgets`.

  Raises:
    ValueError: a value that JSON cannot hold.
  """
  written = {key: _encoded(key, value) for key, value in options.items()}
  return {"format": FORMAT, "recipe": name, "options": written}


def recipe_of(source: str | pathlib.Path) -> tuple[str, dict[str, Any]] | None:
  """Name and options of the recipe that a folder was exported with.

  `recipes.get(name, **options)` gives the slots for `load`.

  Args:
    source: folder or hub id.

  Returns:
    None: the folder has no tokjax.json.

  Raises:
    ValueError: it is not one of ours.
  """
  folder = files.locate(source)
  if not (folder / NOTE).exists():
    return None
  whole = files.read_json(folder / NOTE)
  name, options = whole.get("recipe"), whole.get("options")
  if whole.get("format") != FORMAT or not isinstance(name, str):
    raise ValueError(
      f"{folder / NOTE}: format={whole.get('format')!r}: must be {FORMAT!r}"
    )
  if not isinstance(options, dict):
    raise ValueError(f"{folder / NOTE}: options={options!r}: must be an object")
  where = str(folder / NOTE)
  return name, {k: _decoded(where, k, v) for k, v in options.items()}


def add(
  folder: pathlib.Path,
  model: Any,
  params: Mapping[str, Any],
  dtype: Any,
) -> Any:
  """Parameters with those of the folder that the model's recipe asks for.

  A folder without such a file adds nothing, and neither does one whose model
  is built with a recipe that has no parameters of its own.

  Args:
    folder: of the checkpoint.
    model: with its slots.
    params: of the plain model.
    dtype: of the parameters; None: as stored.

  Raises:
    CheckpointError: the file is of another recipe, or of other counts; lists
      every parameter that does not fit.
  """
  path = folder / TENSORS
  plain = Slots(name=model.slots.name)
  if not path.exists() or model.slots == plain:
    return params
  flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
  wanted = {n: s for n, s in shapes_of(model).items() if n not in flat}
  if not wanted:
    return params
  with files.opened(path) as file:
    found = {name: file.get_tensor(name) for name in file.keys()}
  headers = {n: Header(x.shape, str(x.dtype)) for n, x in found.items()}
  source = f"{path} for recipe {model.slots.name!r}"
  check(headers, wanted, lambda name: False, source)
  values = {n: cast(x, dtype_of(x, dtype)) for n, x in found.items()}
  wrong = [n for n, x in values.items() if not is_finite(x)]
  report([not_finite(n, found[n], values[n].dtype) for n in wrong], source)
  flat |= {n: jnp.asarray(x) for n, x in values.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the parameters of a model with its slots."""
  config, slots = model.config, model.slots
  within = slots.adapter_rank or any(
    r.learned is not None or r.combine is not None for r in slots.reduce
  )
  if isinstance(config, DecoderConfig) and not within:
    return _of_decoder(config, slots)  # Without a trace of every block.
  _, example = model_shapes.specimen(model.config)
  if isinstance(model.config, DecoderConfig):
    length = min(PROMPT, model.config.length)
    example = jax.ShapeDtypeStruct((1, length), jnp.int32)
  make = lambda key, x: model.init(key, x, key=key)
  variables = jax.eval_shape(make, jax.random.key(0), example)
  return _named(variables["params"])


def _of_decoder(
  config: DecoderConfig, slots: Slots
) -> dict[str, tuple[int, ...]]:
  """The plain model's, and what attention and caches learn in each block."""
  found = dict(model_shapes.shapes_of(config))
  for layer in layers_of(config, jnp.float32):
    learned = functools.partial(
      parameters, attend_of(slots), cache_of(slots), layer, config.width
    )
    own = _named(jax.eval_shape(learned, jax.random.key(0)))
    found |= {f"block_{layer.index}/slots/{n}": own[n] for n in own}
  return found


def _named(tree: Any) -> dict[str, tuple[int, ...]]:
  flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
  return {name: leaf.shape for name, leaf in flat.items()}


def write(
  folder: pathlib.Path,
  whole: Mapping[str, Any] | None,
  rest: Mapping[str, Any],
) -> None:
  """Writes both files, or removes what an earlier model had.

  Args:
    folder: of the checkpoint.
    whole: what `note` returned; None: there is no recipe.
    rest: parameters by name.
  """
  if rest:
    arrays = {n: np.ascontiguousarray(x) for n, x in rest.items()}
    files.write_file(folder / TENSORS, arrays)
  else:
    (folder / TENSORS).unlink(missing_ok=True)
  if whole is not None:
    files.write_json(folder / NOTE, whole)
  else:
    (folder / NOTE).unlink(missing_ok=True)


def _encoded(key: str, value: Any) -> Any:
  if value is None or isinstance(value, str | int | float | bool):
    return value
  if isinstance(value, list | tuple):
    return [_encoded(key, x) for x in value]
  kind = type(value).__name__
  if getattr(budgets, kind, None) is type(value):
    names = [f.name for f in dataclasses.fields(value) if f.init]
    inside = {n: _encoded(f"{key}.{n}", getattr(value, n)) for n in names}
    return {BUDGET: kind, **inside}
  raise ValueError(
    f"option {key}={value!r}: cannot be written to {NOTE}; plain values and"
    " budgets of tokjax.budgets can"
  )


def _decoded(where: str, key: str, value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_decoded(where, key, x) for x in value)
  if not isinstance(value, dict):
    return value
  inside = {n: _decoded(where, key, x) for n, x in value.items() if n != BUDGET}
  kind = getattr(budgets, str(value.get(BUDGET)), None)
  if not dataclasses.is_dataclass(kind):
    raise ValueError(
      f"{where}: option {key}={value!r}: must be a plain value, or an object"
      f" with the name of a budget under {BUDGET!r}"
    )
  try:
    return kind(**inside)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{where}: option {key}: {error}") from error
