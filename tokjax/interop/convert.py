"""Parameters to published tensors and back, by the rows of a table."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tokjax.interop import tables
from tokjax.interop.tables import Row
from tokjax.models import vlm_native
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.dense_vit import DenseViT, DenseViTConfig
from tokjax.models.native_patches import NativeResolutionConfig, Patches
from tokjax.models.positions import resize_table
from tokjax.models.vit import ViT, ViTConfig
from tokjax.models.vlm import Prompts, VisionLanguage
from tokjax.models.vlm_config import VisionLanguageConfig

Tower = ViTConfig | NativeResolutionConfig | DecoderConfig
Config = ViTConfig | DecoderConfig | VisionLanguageConfig | DenseViTConfig
FLOATS = ("float64", "float32", "float16", "bfloat16")
# Values that are looked at together, so that a check needs little memory.
CHUNK = 2**24


class CheckpointError(ValueError):
  """Tensors that do not fit the model; the message lists all of them."""


class Header(NamedTuple):
  """What a file says of a tensor without reading it."""

  shape: tuple[int, ...]
  dtype: str


class Entry(NamedTuple):
  """A row with its names filled in for one block."""

  ours: tuple[str, ...]
  theirs: str
  row: Row


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


def dtype_of(tensor: np.ndarray, dtype: Any) -> np.dtype:
  """The dtype wanted, None being the tensor's, as far as JAX has it enabled."""
  return jax.dtypes.canonicalize_dtype(dtype or tensor.dtype)


def cast(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A tensor in a dtype.

  Values beyond the dtype's range become infinite, without a warning.
  """
  with np.errstate(over="ignore"):
    return tensor.astype(dtype, copy=False)


def is_finite(x: np.ndarray) -> bool:
  """True if no value is NaN or infinite; looks at a part at a time."""
  flat = x.reshape(-1)
  parts = range(0, flat.size, CHUNK)
  return all(bool(np.isfinite(flat[i : i + CHUNK]).all()) for i in parts)


def not_finite(name: str, tensor: np.ndarray, dtype: np.dtype) -> str:
  """What is wrong with a tensor of which not all values are finite."""
  if not is_finite(tensor):
    return f"not finite: {name} holds NaN or infinity"
  return f"overflow: {name} holds values beyond the range of {dtype}"


def check(
  headers: Mapping[str, Header],
  wanted: Mapping[str, tuple[int, ...]],
  ignored: Callable[[str], bool],
  source: str,
) -> None:
  """Raises one error that lists all that is wrong with a file's tensors."""
  wrong = []
  for name, shape in wanted.items():
    if name not in headers:
      wrong.append(f"missing: {name} {list(shape)}")
    elif tuple(headers[name].shape) != shape:
      have = list(headers[name].shape)
      wrong.append(f"misshapen: {name} {have}, must be {list(shape)}")
    elif headers[name].dtype not in FLOATS:
      dtype = headers[name].dtype
      wrong.append(f"wrong type: {name} is {dtype}, must be one of {FLOATS}")
  wrong += [
    f"extra: {name} {list(header.shape)}"
    for name, header in headers.items()
    if name not in wanted and not ignored(name)
  ]
  report(wrong, source)


def report(wrong: list[str], source: str) -> None:
  """Raises if there is anything to report."""
  if wrong:
    lines = "\n  ".join(wrong)
    raise CheckpointError(
      f"{source}: {len(wrong)} tensors do not fit\n  {lines}"
    )


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
