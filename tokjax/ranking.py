"""Largest values first, on every device for its own rows.

XLA gathers a sharded batch before `lax.top_k`, because its partitioner does
not know that rows are independent; a sort does not, but is slower. Here the
partitioner is told.
"""

import functools
import string

import jax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_indices(values: Float[Array, "*b n"], k: int) -> Int[Array, "*b k"]:
  """Indices of the k largest along the last axis; ties: the lower one first.

  `lax.top_k(values, k)[1]`, which inserts no collective when leading or
  vmapped axes are sharded.

  Raises:
    ValueError: k is negative or more than n.
  """
  if not 0 <= k <= values.shape[-1]:
    raise ValueError(f"k={k}: must lie in 0..{values.shape[-1]}")
  return _of_rank(values.ndim, k)(values)


@top_indices.defjvp
def _no_gradient(k, primals, tangents):
  del tangents
  index = top_indices(primals[0], k)
  return index, jax.custom_derivatives.zero_from_primal(index)


@functools.cache
def _of_rank(rank: int, k: int):
  """For arrays of that rank; `vmap` adds an axis in front."""
  index = custom_vmap(_partitioned(rank, k) if rank > 1 else _local(k))

  @index.def_vmap
  def _(size, batched, values):
    del size, batched
    return _of_rank(rank + 1, k)(values), True

  return index


def _local(k: int):
  return lambda values: jax.lax.top_k(values, k)[1]


def _partitioned(rank: int, k: int):
  index = custom_partitioning(_local(k))

  def partition(mesh, args, result):
    del args
    rows = tuple(result.sharding.spec)[: rank - 1]
    whole = NamedSharding(mesh, PartitionSpec(*rows))
    return mesh, _local(k), whole, (whole,)

  rows = " ".join(string.ascii_lowercase[: rank - 1])
  index.def_partition(
    partition=partition,
    sharding_rule=f"{rows} source -> {rows} chosen",
    need_replication_factors=("source", "chosen"),
  )
  return index
