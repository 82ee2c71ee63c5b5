"""Builds the `pallas_call` that the three TPU kernels share.

A kernel is a body over named references: `resident` blocks (moved by Pallas's
own pipeline), `streamed` buffers (filled by `tpu_stream`), `outputs` and
`scratch`. Head and block come first in every array, so that a block is
contiguous: `[B, packs, pack, tokens, D]` for rows, `[B, packs, blocks, pack,
block]` for numbers per token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.walks import lists, tpu_plan, tpu_stream


@dataclasses.dataclass(frozen=True)
class Blocked:
  """An array that Pallas moves by blocks.

  Attributes:
    array: the input, or the `jax.ShapeDtypeStruct` of an output.
    block: block shape, None for axes of which one element is taken.
    index: `Place -> block indices`.
  """

  array: Any
  block: tuple
  index: Callable[..., tuple]


@dataclasses.dataclass(frozen=True)
class Streamed:
  """An array in HBM that is streamed along the lists."""

  array: Any
  source: tpu_stream.Source

  def buffer(self, plan):
    """Shape of its buffers in VMEM."""
    shape = self.array.shape
    if self.source.kind == "mask":
      return (plan.depth,) + shape[-2:]
    columns = plan.streamed if self.source.partial else plan.width
    if self.source.kind == "rows":
      return (plan.depth, shape[2], columns, shape[-1])
    return (plan.depth, shape[3], columns)


def heads_first(x, pack, size):
  """`[B, S, H, D]` to `[B, H / pack, pack, S, D]`, D padded to `size`."""
  x = jnp.swapaxes(x, 1, 2)
  if x.shape[-1] != size:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1])))
  return x.reshape(x.shape[0], -1, pack, *x.shape[2:])


def heads_last(x, size):
  """The inverse of `heads_first`, cut to `size`."""
  x = x.reshape(x.shape[0], -1, *x.shape[3:])
  return jnp.swapaxes(x[..., :size], 1, 2)


def lines(x, pack, block):
  """`[B, H, S]` to `[B, H / pack, S / block, pack, block]`."""
  batch, heads, tokens = x.shape
  x = x.reshape(batch, heads // pack, pack, tokens // block, block)
  return jnp.swapaxes(x, 2, 3)


def unlines(x):
  """The inverse of `lines`."""
  batch, packs, blocks, pack, block = x.shape
  return jnp.swapaxes(x, 2, 3).reshape(batch, packs * pack, blocks * block)


def run(
  plan,
  name,
  body,
  layout,
  resident,
  streamed,
  outputs,
  scratch,
  cost,
  interpret=False,
):
  """Runs a kernel.

  Args:
    plan: `tpu_plan.Plan`.
    name: of the kernel, for profiles and dumps.
    body: `(refs, at, n, walk)`: `refs` maps names to references, `at` is the
      `Place`, n the cell's number on the last grid axis, and `walk(visit)`
      visits the listed blocks (see `tpu_stream.Stream.walk`).
    layout: BlockLayout.
    resident, outputs: `{name: Blocked}`.
    streamed: `{name: Streamed}`.
    scratch: `{name: (shape, dtype)}` in VMEM.
    cost: `pl.CostEstimate`.
    interpret: False or `pltpu.InterpretParams`.

  Returns:
    The outputs, in order.
  """
  rows = jnp.expand_dims(lists.rows(plan, layout), -2)
  spec = functools.partial(_spec, plan)
  row_block = (None, None, None, 1, rows.shape[-1])
  row_index = lambda at: (at.lead, at.heads, at.block, 0, 0)
  row_specs = [
    spec(row_block, row_index, ahead, memory_space=pltpu.SMEM)
    for ahead in (0, 1)
  ]
  buffers = {
    key: pltpu.VMEM(x.buffer(plan), x.array.dtype)
    for key, x in streamed.items()
  }
  scratch = {key: pltpu.VMEM(*x) for key, x in scratch.items()}
  names = list(resident), list(streamed), list(outputs), list(scratch)
  kernel = functools.partial(
    _kernel, plan, body, [x.source for x in streamed.values()], names
  )
  call = pl.pallas_call(
    kernel,
    out_shape=[x.array for x in outputs.values()],
    grid=plan.grid,
    in_specs=(
      row_specs
      + [spec(x.block, x.index) for x in resident.values()]
      + [pl.BlockSpec(memory_space=pl.ANY)] * len(streamed)
    ),
    out_specs=[spec(x.block, x.index) for x in outputs.values()],
    scratch_shapes=[
      *buffers.values(),
      *scratch.values(),
      pltpu.SemaphoreType.DMA((plan.depth,)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=tpu_plan.VMEM_LIMIT,
      disable_bounds_checks=True,
      disable_semaphore_checks=True,
    ),
    cost_estimate=cost,
    interpret=interpret,
    name=name,
  )
  return call(
    rows,
    rows,
    *(x.array for x in resident.values()),
    *(x.array for x in streamed.values()),
  )


def _spec(plan, block, index, ahead=0, **kwargs):
  """BlockSpec whose index map sees the `Place` of this or the next cell."""
  last = plan.grid[2] - 1

  def index_map(b, x, n):
    n = jnp.minimum(n + ahead, last) if ahead else n
    return index(tpu_stream.place(plan, b, x, n))

  return pl.BlockSpec(block, index_map, **kwargs)


def _kernel(plan, body, sources, names, row, next_row, *refs):
  """Sorts the references by name, and runs the body."""
  refs = list(refs)
  take = lambda keys: {key: refs.pop(0) for key in keys}
  resident_names, streamed_names, output_names, scratch_names = names
  named = take(resident_names)
  hbm = take(streamed_names)
  named |= take(output_names)
  buffers = take(streamed_names)
  named |= buffers | take(scratch_names)
  semaphores, position = refs
  b, x, n = (pl.program_id(axis) for axis in range(3))
  stream = tpu_stream.Stream(
    plan, sources, hbm.values(), buffers.values(), semaphores, position
  )
  at = tpu_stream.place(plan, b, x, n)
  following = tpu_stream.place(plan, b, x, jnp.minimum(n + 1, plan.grid[2] - 1))
  walk = functools.partial(
    stream.walk,
    at,
    tpu_stream.Row(plan, row),
    following,
    tpu_stream.Row(plan, next_row),
    n,
  )
  body(named, at, n, walk)


def cost(plan, products, blocks):
  """`pl.CostEstimate` of a kernel with full lists: an upper bound.

  Args:
    plan: the `Plan`.
    products: matrix products of one tile, in units of `[rows, columns] x d`.
    blocks: bytes of resident inputs and outputs, moved once.
  """
  pairs = plan.steps() * plan.block_q * plan.block_k * plan.pack
  streamed = (
    plan.steps()
    * plan.streamed
    * plan.streamed_heads
    * (plan.d + plan.dv)
    * plan.item
  )
  return pl.CostEstimate(
    flops=int(2 * pairs * products * (plan.d + plan.dv) // 2),
    transcendentals=int(pairs),
    bytes_accessed=int(streamed + blocks),
  )


def nbytes(*arrays):
  """Bytes of arrays or shapes together."""
  return sum(
    x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(list(arrays))
  )
