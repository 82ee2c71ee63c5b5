"""Forward kernel of the mass sums for GPU: column and block sums in one pass.

Keys are resident, and queries streamed by the transposed lists. A tile of
`p * weight` gives a number for each of its 64 keys. These are added up over all
queries (column sums), and stored side by side for each step: every 64 steps
their sums over the keys are written (block sums), in the order of the list.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import (
  gpu_call,
  gpu_operands,
  gpu_plan,
  gpu_stream,
)
from pallas_kernels.walks import gpu_tiles as tiles

_ROWS = gpu_plan.ROWS
# Steps whose sums are kept before they are written.
_KEPT = gpu_plan.MASS_SUMS // (4 * _ROWS)
# Numbers that come along with a query, and with a key.
NUMBERS = 6


def forward(params, operands, weights, lse, interpret=None):
  """See `xla.forward`."""
  plan = gpu_plan.make(operands, "mass", NUMBERS)
  arrays = gpu_operands.Arrays(plan, operands)
  batch, length, _, _ = operands.k.shape
  steps = sum(plan.capacity) * plan.parts
  rows = (plan.warpgroups, _ROWS)
  line = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  columns, sums = gpu_call.run(
    plan,
    params,
    "attention_mass",
    functools.partial(gpu_stream.stream_heads, plan),
    _compute,
    {"lists": arrays.rows, "k": arrays.k, **arrays.masks()},
    ({**arrays.queries(lse), "weight": gpu_stream.Source(weights)},),
    {
      "columns": line((batch, plan.heads, length)),
      "sums": line(
        (batch, plan.heads, length // _ROWS, -(-steps // _KEPT) * _KEPT)
      ),
    },
    {
      "k_rows": gpu_stream.rows_buffer(rows + (plan.d,), operands.k.dtype),
      "kept": plgpu.SMEM((plan.warpgroups, _KEPT, _ROWS), jnp.float32),
      "line": plgpu.SMEM(rows, jnp.float32),
      "arrived": plgpu.Barrier(num_barriers=plan.warpgroups),
    },
    interpret,
  )
  return columns, _by_block(plan, operands.layout, sums[..., :steps])


def _compute(cell):
  """One warpgroup's keys against all heads that share them."""
  plan, refs, at = cell.plan, cell.refs, cell.at
  arrived = cell.own("arrived")
  source = refs["k"].at[at.batch, cell.here, at.group]
  plgpu.copy_gmem_to_smem(source, cell.own("k_rows"), arrived)
  plgpu.barrier_wait(arrived)

  def turn(at, position):
    here = cell.turn_to(at)
    start = jnp.int32(0), tiles.full((_ROWS,), 0)
    visit = functools.partial(_visit, here)
    position, (taken, total) = gpu_stream.walk(
      plan, here.row(), position, visit, start
    )
    pl.when(lax.rem(taken, jnp.int32(_KEPT)) > 0)(
      functools.partial(_write_sums, here, taken)
    )
    target = refs["columns"].at[at.batch, at.head, cell.here]
    write(here.own("line"), total, target)
    return position

  gpu_stream.each_head(plan, at, turn, jnp.int32(0))


def _visit(cell, step, carry):
  """Adds a tile of queries; `carry` is the steps taken, and column sums."""
  taken, total = carry
  p, weight, _ = tile_of_queries(cell, step)
  line = jnp.sum(p * weight, axis=1)
  gpu_stream.release(step.slot, *cell.rings)
  slot = lax.rem(taken, jnp.int32(_KEPT))
  cell.own("kept").at[slot][...] = line
  taken = taken + 1
  pl.when(slot == _KEPT - 1)(functools.partial(_write_sums, cell, taken))
  return taken, total + line


def tile_of_queries(cell, step):
  """A tile of resident keys against streamed queries.

  Returns:
    Probabilities and the weights of the queries, `[64, tile]`, and the
    `tiles.Logits`. The buffers are still in use.
  """
  plan, buffers = cell.plan, cell.buffers(step)
  (queries,) = cell.rings
  queries.wait(step.slot)
  read = lambda name: tiles.spread(
    tiles.line(buffers[name].at[0], tiles.BY_COLUMN), plan.tile, 1
  )
  s = tiles.product(cell.own("k_rows"), tiles.turned(buffers["q"]))
  logits = gpu_operands.logits(cell, step, s)
  return logits.exp2(read("lse")), read("weight"), logits


def _write_sums(cell, taken):
  """Sums over the keys for the steps that are kept, `taken` so far."""
  plgpu.commit_smem()
  sums = jnp.sum(tiles.load_plain(cell.own("kept")), axis=1)
  first = lax.div(taken - 1, jnp.int32(_KEPT)) * _KEPT
  tile = lax.div(cell.start, jnp.int32(_ROWS))
  here = (cell.at.batch, cell.head, tile, pl.ds(first, _KEPT))
  write(cell.own("line"), sums, cell.refs["sums"].at[here])


def write(line, values, target):
  """Copies numbers of rows to global memory."""
  line[...] = values
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(line, target)
  plgpu.wait_smem_to_gmem(0)


def _by_block(plan, layout, sums):
  """Sums of the steps of each list, to `[B, H, q blocks, k blocks]`."""
  lists = layout.transpose
  entry = jnp.arange(sum(plan.capacity), dtype=jnp.int32)
  shape = (plan.batch, plan.heads, plan.k_blocks)
  sums = sums.reshape(*shape, -1, len(entry), plan.parts).sum(axis=(3, 5))

  def row(sums, full_count, full, partial_count, partial):
    at = entry - full_count
    block = jnp.where(
      at < 0, jnp.take(full, entry, mode="clip"),
      jnp.take(partial, at, mode="clip"),
    )  # fmt: skip
    block = jnp.where(at < partial_count, block, plan.q_blocks)
    return jnp.zeros((plan.q_blocks,)).at[block].add(sums, mode="drop")

  of_heads = lambda x: jnp.repeat(
    jnp.broadcast_to(x, (plan.batch, *x.shape[1:])),
    plan.heads // plan.list_heads, axis=1,
  )  # fmt: skip
  for _ in shape:
    row = jax.vmap(row)
  found = row(
    sums, *map(of_heads, (lists.full_count, lists.full_index)),
    *map(of_heads, (lists.partial_count, lists.partial_index)),
  )  # fmt: skip
  return jnp.swapaxes(found, 2, 3)
