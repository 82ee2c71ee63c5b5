"""Parameters to published tensors and back, by the rows of a table."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tokjax.interop import tables
from tokjax.interop.model_shapes import Config, shapes_of
from tokjax.interop.tables import Row
from tokjax.interop.tensors import (
  CheckpointError,
  Header,
  cast,
  check,
  dtype_of,
  is_finite,
  not_finite,
  report,
)
from tokjax.models.positions import resize_table
from tokjax.models.vit import ViTConfig


class Entry(NamedTuple):
  """A row with its names filled in for one block."""

  ours: tuple[str, ...]
  theirs: str
  row: Row


def matches(
  rows: Iterable[Row], config: Config, prefix: str, within: str = ""
) -> list[Entry]:
  """The rows a configuration uses, one for each block where they repeat.

  `within` names a part of the model whose parameters the rows are of.
  """
  shapes, found = shapes_of(config), []
  if within:
    own = f"{within}/"
    shapes = {n.removeprefix(own) for n in shapes if n.startswith(own)}
  head = tables.head_prefix(prefix)
  for row in rows:
    blocks = range(config.depth) if "{i}" in row.theirs else range(1)
    for i in blocks:
      ours = tuple(name.format(i=i) for name in row.ours)
      if all(name in shapes for name in ours):
        found.append(Entry(ours, row.theirs.format(i=i, p=prefix, h=head), row))
  return found


def entries(rows: Iterable[Row], config: Config, prefix: str) -> list[Entry]:
  """`matches`, checked to hold every parameter.

  Raises:
    CheckpointError: the layout has no place for some of them.
  """
  return complete(matches(rows, config, prefix), config)


def complete(found: list[Entry], config: Config) -> list[Entry]:
  """The same entries.

  Raises:
    CheckpointError: they have no place for some parameters.
  """
  placed = {name for entry in found for name in entry.ours}
  if lost := [name for name in shapes_of(config) if name not in placed]:
    raise CheckpointError(f"the layout has no place for {', '.join(lost)}")
  return found


def write_entry(entry: Entry, values: list[np.ndarray]) -> np.ndarray:
  """The published tensor of an entry's parameters."""
  return np.concatenate([entry.row.arrange.write(x) for x in values], axis=0)


def published_shape(entry: Entry, shapes: Mapping) -> tuple[int, ...]:
  """The shape a file must have for an entry; arranges arrays of no size."""
  blank = np.zeros((), np.bool_)
  values = [np.broadcast_to(blank, shapes[name]) for name in entry.ours]
  return write_entry(entry, values).shape


def read_params(
  headers: Mapping[str, Header],
  read: Callable[[list[str]], Mapping[str, np.ndarray]],
  found: list[Entry],
  config: Config,
  *,
  ignored: Callable[[str], bool],
  dtype: Any,
  source: str,
) -> dict[str, Any]:
  """Published tensors as the parameters of a model.

  Args:
    headers: what the file holds.
    read: gives the named tensors.
    found: the entries of the file's layout.
    config: the file's architecture.
    ignored: True for tensors that belong to other parts (a text tower).
    dtype: of the parameters; None: as stored.
    source: for messages.

  Raises:
    CheckpointError: lists every tensor that is missing, left over, of another
      shape or not of a floating type; or else every one with values that are
      not finite, or not in `dtype`.
  """
  shapes = shapes_of(config)
  wanted = {entry.theirs: published_shape(entry, shapes) for entry in found}
  check(headers, wanted, ignored, source)
  tensors = dict(read(list(wanted)))
  dtypes = [dtype_of(tensors[entry.theirs], dtype) for entry in found]

  def placed(entry: Entry, dtype: np.dtype) -> list[np.ndarray] | str:
    """The parameters of an entry, or what is wrong with it."""
    tensor = tensors.pop(entry.theirs)
    value = cast(tensor, dtype)
    if not is_finite(value):
      return not_finite(entry.theirs, tensor, dtype)
    parts = zip(entry.ours, np.split(value, len(entry.ours)), strict=True)
    return [entry.row.arrange.read(part, shapes[name]) for name, part in parts]

  flat, wrong = {}, []
  # NumPy lets other threads run while it looks and copies. JAX's settings are
  # those of a thread, so that dtypes and arrays are of this one.
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    every = pool.map(placed, found, dtypes)
    for entry, parts in zip(found, every, strict=True):
      if isinstance(parts, str):
        wrong.append(parts)
        continue
      for name, part in zip(entry.ours, parts, strict=True):
        flat[name] = jnp.asarray(part)
  report(wrong, source)
  return traverse_util.unflatten_dict(flat, sep="/")


def write_tensors(
  params: Mapping[str, Any], found: list[Entry], config: Config, dtype: Any
) -> dict[str, np.ndarray]:
  """Parameters as published tensors.

  Raises:
    CheckpointError: lists every parameter that the configuration does not
      have, or that is missing or of another shape.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
  headers = {n: Header(x.shape, str(x.dtype)) for n, x in flat.items()}
  check(headers, shapes_of(config), lambda name: False, "params")
  tensors = {}
  for entry in found:
    values = [np.asarray(flat[name]) for name in entry.ours]
    value = write_entry(entry, values)
    # safetensors writes the buffer of a transposed array without its strides.
    tensors[entry.theirs] = np.ascontiguousarray(
      value if dtype is None else value.astype(dtype)
    )
  return tensors


def adapt(
  params: Mapping[str, Any], own: Config, config: Config, source: str
) -> dict[str, Any]:
  """Parameters of one configuration for another one of the same family.

  Heads that the other does not have are left out and the position table is
  interpolated; all else must fit.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep="/")
  if isinstance(own, ViTConfig) and isinstance(config, ViTConfig):
    flat |= adapt_positions(flat, own, config)
  wanted = shapes_of(config)
  headers = {n: Header(x.shape, str(x.dtype)) for n, x in flat.items()}
  check(headers, wanted, lambda name: True, f"{source} with other options")
  return traverse_util.unflatten_dict({n: flat[n] for n in wanted}, sep="/")


def adapt_positions(
  flat: Mapping[str, Any], own: ViTConfig, config: ViTConfig
) -> dict[str, Any]:
  """The position table of another grid, if it has the same rows in front."""
  lead = own.positions_in_front
  if own.grid == config.grid or lead != config.positions_in_front:
    return {}
  table = flat["embed/position"]
  body = resize_table(
    table[:, lead:], own.grid, config.grid, config.position_resize
  )
  return {"embed/position": jnp.concatenate([table[:, :lead], body], axis=1)}
