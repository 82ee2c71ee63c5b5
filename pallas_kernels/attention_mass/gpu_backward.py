"""Backward kernels of the mass sums for GPU; see `op` for the formulas.

`g = d_columns + d_blocks` is put together in each tile: a number for each key,
and one for the whole tile, which is read from global memory.
"""

import functools

import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention_mass import gpu_forward
from pallas_kernels.walks import (
  gpu_call,
  gpu_operands,
  gpu_plan,
  gpu_stream,
  gpu_sums,
)
from pallas_kernels.walks import gpu_tiles as tiles

_ROWS = gpu_plan.ROWS


def backward(
  params, operands, weights, lse, d_columns, d_blocks, interpret=None
):
  """See `xla.backward`."""
  given = operands, weights, lse, d_columns, d_blocks
  d_q, r = _queries(params, *given, interpret)
  given = operands, weights, gpu_call.after(lse, d_q, interpret), *given[3:]
  d_k, d_bias = _keys(params, *given, interpret)
  return d_q, d_k, d_bias, r


def _queries(params, operands, weights, lse, d_columns, d_blocks, interpret):
  """d_q and r, by the lists of the query blocks."""
  plan = gpu_plan.make(operands, "mass_d_q", gpu_forward.NUMBERS)
  arrays = gpu_operands.Arrays(plan, operands)
  rows = (plan.warpgroups, _ROWS)
  resident = {"q": arrays.q, "lse": lse * tiles.LOG2E, "weight": weights}
  d_q, r = gpu_call.run(
    plan,
    params,
    "attention_mass_d_q",
    functools.partial(gpu_stream.stream_cell, plan),
    _compute_queries,
    {
      "lists": arrays.rows, "d_blocks": d_blocks, **resident, **arrays.masks()
    },
    ({**arrays.keys(), "g": gpu_stream.Source(d_columns)},),
    {
      "d_q": jax.ShapeDtypeStruct(arrays.q.shape, operands.q.dtype),
      "r": jax.ShapeDtypeStruct(lse.shape, jnp.float32),
    },
    {
      "q_rows": gpu_stream.rows_buffer(rows + (plan.d,), operands.q.dtype),
      "lse_rows": plgpu.SMEM(rows, jnp.float32),
      "weight_rows": plgpu.SMEM(rows, jnp.float32),
      "arrived": plgpu.Barrier(
        num_arrivals=len(resident), num_barriers=plan.warpgroups
      ),
      **arrays.staging(interpret),
    },
    interpret,
  )  # fmt: skip
  return d_q[..., : operands.q.shape[-1]], r


def _compute_queries(cell):
  """One warpgroup's queries."""
  plan, refs, batch = cell.plan, cell.refs, cell.at.batch
  arrived = cell.own("arrived")
  rows, line = (batch, cell.here, cell.head), (batch, cell.head, cell.here)
  for name, where in (("q", rows), ("lse", line), ("weight", line)):
    plgpu.copy_gmem_to_smem(
      refs[name].at[where], cell.own(f"{name}_rows"), arrived
    )
  row = cell.row()
  plgpu.barrier_wait(arrived)
  lines = [
    tiles.line(cell.own(name), tiles.BY_ROW)
    for name in ("lse_rows", "weight_rows")
  ]
  visit = functools.partial(_visit_keys, cell, *lines)
  start = gpu_sums.zeros(plan.d), tiles.full((_ROWS,), 0)
  _, (d_q, r) = gpu_stream.walk(plan, row, jnp.int32(0), visit, start)
  out = cell.own("q_rows")
  gpu_sums.put(out, d_q, cell.params.scale)
  plgpu.copy_smem_to_gmem(out, refs["d_q"].at[rows])
  gpu_forward.write(cell.own("lse_rows"), r, refs["r"].at[line])


def _visit_keys(cell, lse, weight, step, carry):
  """Adds what a tile of keys contributes to d_q and r."""
  plan, buffers = cell.plan, cell.buffers(step)
  total, r = carry
  (keys,) = cell.rings
  keys.wait(step.slot)
  s = tiles.product(cell.own("q_rows"), tiles.turned(buffers["k"]))
  logits = gpu_operands.logits(cell, step, s)
  p = logits.exp2(tiles.spread(lse, plan.tile, 0))
  own = buffers["g"].at[cell.warpgroup if plan.head_pairs else 0]
  g = tiles.spread(tiles.line(own, tiles.BY_COLUMN), plan.tile, 1)
  pg = p * (g + _of_block(cell, cell.at.block, step.block()))
  r = r + jnp.sum(pg, axis=1)
  d_s = _sloped(logits, pg * tiles.spread(weight, plan.tile, 0))
  factors = (d_s.astype(buffers["k"].dtype), buffers["k"])
  (total,) = gpu_sums.add(cell, (total,), (factors,))
  gpu_stream.release(step.slot, keys)
  return total, r


def _of_block(cell, q_block, k_block):
  """The cotangent of a block's sum."""
  return cell.refs["d_blocks"][cell.at.batch, cell.head, q_block, k_block]


def _sloped(logits, d_logits):
  """Gradient of scores, without scale."""
  return d_logits if logits.slope is None else d_logits * logits.slope


def _keys(params, operands, weights, lse, d_columns, d_blocks, interpret):
  """d_k and d_bias, by the transposed lists."""
  plan = gpu_plan.make(operands, "mass_d_k", gpu_forward.NUMBERS)
  arrays = gpu_operands.Arrays(plan, operands)
  rows = (plan.warpgroups, _ROWS)
  outputs = {"d_k": jax.ShapeDtypeStruct(arrays.k.shape, operands.k.dtype)}
  if plan.has_bias:
    outputs["d_bias"] = jax.ShapeDtypeStruct(d_columns.shape, jnp.float32)
  d_k, *d_bias = gpu_call.run(
    plan,
    params,
    "attention_mass_d_k",
    functools.partial(gpu_stream.stream_heads, plan),
    _compute_keys,
    {
      "lists": arrays.rows, "k": arrays.k, "g": d_columns,
      "d_blocks": d_blocks, **arrays.masks(),
    },
    ({**arrays.queries(lse), "weight": gpu_stream.Source(weights)},),
    outputs,
    {
      "k_rows": gpu_stream.rows_buffer(rows + (plan.d,), operands.k.dtype),
      "line": plgpu.SMEM(rows, jnp.float32),
      "arrived": plgpu.Barrier(num_barriers=plan.warpgroups),
      **arrays.staging(interpret),
    },
    interpret,
  )  # fmt: skip
  return d_k[..., : operands.k.shape[-1]], d_bias[0] if d_bias else None


def _compute_keys(cell):
  """One warpgroup's keys against all heads that share them."""
  plan, refs, at = cell.plan, cell.refs, cell.at
  arrived = cell.own("arrived")
  rows = (at.batch, cell.here, at.group)
  plgpu.copy_gmem_to_smem(refs["k"].at[rows], cell.own("k_rows"), arrived)
  plgpu.barrier_wait(arrived)

  def turn(at, state):
    position, total = state
    here = cell.turn_to(at)
    line = (at.batch, at.head, cell.here)
    g = tiles.global_line(refs["g"].at[line], tiles.BY_ROW)
    start = total, (tiles.full((_ROWS,), 0),) * plan.has_bias
    visit = functools.partial(_visit_queries, here, g)
    position, (total, d_bias) = gpu_stream.walk(
      plan, here.row(), position, visit, start
    )
    for found in d_bias:
      gpu_forward.write(here.own("line"), found, refs["d_bias"].at[line])
    return position, total

  start = jnp.int32(0), gpu_sums.zeros(plan.d)
  _, d_k = gpu_stream.each_head(plan, at, turn, start)
  gpu_sums.put(cell.own("k_rows"), d_k, cell.params.scale)
  plgpu.copy_smem_to_gmem(cell.own("k_rows"), refs["d_k"].at[rows])
  plgpu.wait_smem_to_gmem(0)


def _visit_queries(cell, g, step, carry):
  """Adds what a tile of queries contributes to d_k and d_bias."""
  total, d_bias = carry
  plan, q = cell.plan, cell.buffers(step)["q"]
  p, weight, logits = gpu_forward.tile_of_queries(cell, step)
  of_block = _of_block(cell, step.block(), cell.at.block)
  d_logits = p * (tiles.spread(g, plan.tile, 0) + of_block) * weight
  d_bias = tuple(line + jnp.sum(d_logits, axis=1) for line in d_bias)
  d_s = _sloped(logits, d_logits).astype(q.dtype)
  (total,) = gpu_sums.add(cell, (total,), ((d_s, q),))
  gpu_stream.release(step.slot, *cell.rings)
  return total, d_bias
