"""Which part of what lies on which device: data, fsdp and model axes."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.training.trees import path_name

AXES = ("data", "fsdp", "model")
# Megatron's cut: first layers of a pair by columns, second ones by rows.
MODEL_RULES = (
  (r"(query|key|value|fc1)[_0-9]*/kernel$", P(None, "model")),
  (r"(query|key|value|fc1)[_0-9]*/bias$", P("model")),
  (r"(out|fc2)[_0-9]*/kernel$", P("model", None)),
)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Sizes of the mesh axes; -1 (once): all devices that are left.

  Attributes:
    data: copies of the model; the batch is split.
    fsdp: the batch is split, and parameters too.
    model: matrices are split, every device sees the whole batch.
  """

  data: int = -1
  fsdp: int = 1
  model: int = 1

  def build(self) -> jax.sharding.Mesh:
    """The mesh over all devices of all hosts."""
    sizes, count = [self.data, self.fsdp, self.model], jax.device_count()
    fixed = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
      raise ValueError(f"mesh={sizes}: positive sizes, and -1 once at most")
    sizes = [count // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != count:
      raise ValueError(
        f"mesh data x fsdp x model = {sizes}: must multiply to the {count}"
        " devices"
      )
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of a batch over the data and fsdp axes."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def for_run(config: Any) -> jax.sharding.Mesh:
  """The mesh of a `Config`; raises if its batches do not divide."""
  mesh = config.mesh.build()
  for name in ("batch_size", "eval_batch_size"):
    check_batch(mesh, name, getattr(config, name))
  return mesh


def check_batch(mesh: jax.sharding.Mesh, name: str, size: int) -> None:
  """Raises ValueError unless a batch divides over the data and fsdp axes."""
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if size % parts:
    raise ValueError(
      f"{name}={size}: must be a multiple of data x fsdp = {parts}"
    )


def put_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> Any:
  """This host's rows as part of the global batch."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_shapes(
  mesh: jax.sharding.Mesh, example: dict[str, np.ndarray], rows: int
) -> Any:
  """Shapes of a global batch of `rows` such examples, to compile for."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (rows, *x.shape[1:]), x.dtype, sharding=sharding
    ),
    example,
  )


def with_sharding(mesh: jax.sharding.Mesh, shapes: Any) -> Any:
  """Shapes with a sharding for every array, by path and shape.

  An optimiser's moments have the paths of their parameters at the end, so
  that one rule serves both. Dimensions that do not divide stay whole.
  """

  def one(path, x):
    sharding = NamedSharding(mesh, _spec(mesh, path_name(path), x.shape))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(one, shapes)


def _spec(mesh: jax.sharding.Mesh, name: str, shape: tuple[int, ...]) -> P:
  axes: list[str | None] = [None] * len(shape)
  for pattern, spec in MODEL_RULES:
    if re.search(pattern, name) and len(spec) == len(shape):
      axes = [
        a if a and mesh.shape[a] > 1 and size % mesh.shape[a] == 0 else None
        for a, size in zip(spec, shape, strict=True)
      ]
  free = [
    i
    for i, size in enumerate(shape)
    if axes[i] is None and size % mesh.shape["fsdp"] == 0
  ]
  if mesh.shape["fsdp"] > 1 and len(shape) > 1 and free:
    axes[max(free, key=lambda i: shape[i])] = "fsdp"
  return P(*axes)
