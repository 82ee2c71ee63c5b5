"""Backward kernels for GPU.

Two passes, each recomputing the probabilities from lse: queries against their
key blocks for d_q, and keys against the query blocks that list them (the
transposed lists) for d_k, d_v and d_bias. Every sum is made by one warpgroup
in a fixed order, without atomics, so that gradients are reproducible. Where
the sums of d_k and d_v do not fit the registers together (large heads, or a
soft cap, whose slope needs some too) each takes a pass of its own.
"""

import functools

import jax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import (
  gpu_call,
  gpu_operands,
  gpu_plan,
  gpu_stream,
  gpu_sums,
)
from pallas_kernels.walks import gpu_tiles as tiles

_ROWS = gpu_plan.ROWS
# Widths of d_k and d_v together whose sums fit the registers.
_SUMS = 256


def backward(operands, params, lse, delta, d_out, interpret=None):
  """See `contract`."""
  d_q = _queries(operands, params, lse, delta, d_out, interpret)
  sizes = (operands.q.shape[-1], operands.v.shape[-1])
  found, last = {}, d_q
  passes = _passes(sizes, params.soft_cap, operands.bias is not None)
  for wanted in passes:
    lse = gpu_call.after(lse, last, interpret)
    found |= _keys(operands, params, lse, delta, d_out, interpret, wanted)
    last = found[wanted[0]]
  d_k, d_v = (
    found[name][..., :size]
    for name, size in zip(("d_k", "d_v"), sizes, strict=True)
  )
  return d_q, d_k, d_v, found.get("d_bias")


def _passes(sizes, soft_cap, has_bias):
  """Which gradients each walk over the transposed lists makes."""
  wide = sum(map(gpu_plan.padded, sizes)) > _SUMS
  if not wide and soft_cap is None:
    return (("d_k", "d_v") + ("d_bias",) * has_bias,)
  if not has_bias:
    return ("d_k",), ("d_v",)
  if wide and soft_cap is not None:
    return ("d_k",), ("d_v",), ("d_bias",)
  return ("d_k", "d_bias"), ("d_v",)


def _queries(operands, params, lse, delta, d_out, interpret):
  """d_q, by the lists of the query blocks."""
  plan = gpu_plan.make(operands, "d_q")
  arrays = gpu_operands.Arrays(plan, operands)
  dtype = operands.q.dtype
  rows = (plan.warpgroups, _ROWS)
  resident = {
    "q": arrays.q,
    "d_out": arrays.d_out(d_out),
    "lse": lse * tiles.LOG2E,
    "delta": delta,
  }
  scratch = {
    "q_rows": gpu_stream.rows_buffer(rows + (plan.d,), dtype),
    "d_out_rows": gpu_stream.rows_buffer(rows + (plan.dv,), dtype),
    "lse_rows": plgpu.SMEM(rows, jnp.float32),
    "delta_rows": plgpu.SMEM(rows, jnp.float32),
    "arrived": plgpu.Barrier(
      num_arrivals=len(resident), num_barriers=plan.warpgroups
    ),
    **arrays.staging(interpret),
  }
  (d_q,) = gpu_call.run(
    plan,
    params,
    "block_sparse_attention_d_q",
    functools.partial(gpu_stream.stream_cell, plan),
    _compute_queries,
    {"lists": arrays.rows, **resident, **arrays.masks()},
    arrays.streamed_keys(),
    {"d_q": jax.ShapeDtypeStruct(resident["q"].shape, dtype)},
    scratch,
    interpret,
  )
  return d_q[..., : operands.q.shape[-1]]


def _compute_queries(cell):
  """One warpgroup's queries."""
  plan, refs, batch = cell.plan, cell.refs, cell.at.batch
  arrived = cell.own("arrived")
  for name in ("q", "d_out", "lse", "delta"):
    index = (cell.here, cell.head)
    if name in ("lse", "delta"):
      index = index[::-1]
    plgpu.copy_gmem_to_smem(
      refs[name].at[batch, *index], cell.own(f"{name}_rows"), arrived
    )
  row = cell.row()
  plgpu.barrier_wait(arrived)
  lines = [
    tiles.line(cell.own(name), tiles.BY_ROW)
    for name in ("lse_rows", "delta_rows")
  ]
  visit = functools.partial(_visit_keys, cell, lines)
  _, d_q = gpu_stream.walk(
    plan, row, jnp.int32(0), visit, gpu_sums.zeros(plan.d)
  )
  out = cell.own("q_rows")
  gpu_sums.put(out, d_q, cell.params.scale)
  plgpu.copy_smem_to_gmem(out, refs["d_q"].at[batch, cell.here, cell.head])
  plgpu.wait_smem_to_gmem(0)


def _visit_keys(cell, lines, step, total):
  """Adds what a tile of keys contributes to d_q."""
  keys, values = cell.rings
  buffers = cell.buffers(step)
  keys.wait(step.slot)
  d_s, _, _ = _gradients(
    cell,
    step,
    (cell.own("q_rows"), tiles.turned(buffers["k"])),
    lambda: (cell.own("d_out_rows"), tiles.turned(buffers["v"])),
    lines,
  )
  gpu_stream.release(step.slot, values)
  (total,) = gpu_sums.add(cell, (total,), ((d_s, buffers["k"]),))
  gpu_stream.release(step.slot, keys)
  return total


def _gradients(cell, step, scores, d_scores, lines):
  """Gradients of scores (without scale), probabilities, and of logits.

  Args:
    cell, step: where.
    scores: factors of the scores.
    d_scores: returns the factors of d_out . v, when their ring is filled.
    lines: lse and delta, numbers of rows, or of columns where keys are
      resident. An iterable that reads late saves registers.

  Returns:
    Of each `[64, tile]`; the first two in the dtype of the next product.
  """
  plan, params, dtype = cell.plan, cell.params, scores[0].dtype
  axis = 1 if plan.keys_resident else 0
  lines = iter(lines)

  def probabilities(s):
    logits = gpu_operands.logits(cell, step, s)
    p = logits.exp2(tiles.spread(next(lines), plan.tile, axis))
    # With the slope of the cap in it there is one tile to keep, unless the
    # gradient of logits is asked for too.
    return p, p if logits.slope is None else p * logits.slope

  # Where there is more to compute, registers are too few to do it early.
  simple = step.entry is None and params.soft_cap is None
  simple = simple and max(plan.d, plan.dv) <= gpu_sums.COLUMNS

  def second():
    cell.rings[1].wait(step.slot)
    return d_scores()

  (p, sloped), d_p = tiles.two_products(
    scores, second, probabilities, overlap=simple
  )
  d_out_v = d_p - tiles.spread(next(lines), plan.tile, axis)
  return (sloped * d_out_v).astype(dtype), p.astype(dtype), p * d_out_v


def _keys(operands, params, lse, delta, d_out, interpret, wanted):
  """d_k, d_v and d_bias, by the transposed lists: a dict of what is wanted."""
  # Of all d_v alone needs no gradients of scores.
  scores = wanted != ("d_v",)
  plan = gpu_plan.make(operands, "d_kv" if scores else "d_v")
  arrays = gpu_operands.Arrays(plan, operands)
  dtype = operands.k.dtype
  rows = (plan.warpgroups, _ROWS)
  resident = {"k": arrays.k} | ({"v": arrays.v} if scores else {})
  scratch = {
    "k_rows": gpu_stream.rows_buffer(rows + (plan.d,), dtype),
    "arrived": plgpu.Barrier(
      num_arrivals=len(resident), num_barriers=plan.warpgroups
    ),
    **arrays.staging(interpret),
  }
  if scores or plan.d != plan.dv:
    scratch["v_rows"] = gpu_stream.rows_buffer(rows + (plan.dv,), dtype)
  if "d_bias" in wanted:
    scratch["bias_line"] = plgpu.SMEM(rows, jnp.float32)
  like = {"d_k": arrays.k, "d_v": arrays.v, "d_bias": operands.bias}
  outputs = {
    name: jax.ShapeDtypeStruct(like[name].shape, like[name].dtype)
    for name in wanted
  }
  found = gpu_call.run(
    plan,
    params,
    "block_sparse_attention_" + _name(wanted),
    functools.partial(gpu_stream.stream_heads, plan),
    functools.partial(_compute_keys, wanted, tuple(resident)),
    {"lists": arrays.rows, **resident, **arrays.masks()},
    arrays.streamed_queries(lse, delta if scores else None, d_out),
    outputs,
    scratch,
    interpret,
  )
  return dict(zip(outputs, found, strict=True))


def _name(wanted):
  return "d_kv" if {"d_k", "d_v"} <= set(wanted) else wanted[0]


def _compute_keys(wanted, resident, cell):
  """One warpgroup's keys against all heads that share them."""
  plan, refs, at = cell.plan, cell.refs, cell.at
  arrived = cell.own("arrived")
  for name in resident:
    source = refs[name].at[at.batch, cell.here, at.group]
    plgpu.copy_gmem_to_smem(source, cell.own(f"{name}_rows"), arrived)
  plgpu.barrier_wait(arrived)
  widths = {"d_k": plan.d, "d_v": plan.dv}
  summed = [name for name in wanted if name in widths]
  sums = tuple(gpu_sums.zeros(widths[name]) for name in summed)

  def turn(at, state):
    position, sums = state
    here = cell.turn_to(at)
    line = (tiles.full((_ROWS,), 0),) if "d_bias" in wanted else ()
    visit = functools.partial(_visit_queries, wanted, here)
    position, (sums, line) = gpu_stream.walk(
      plan, here.row(), position, visit, (sums, line)
    )
    if line:
      here.own("bias_line")[...] = line[0]
      plgpu.commit_smem()
      target = refs["d_bias"].at[at.batch, at.head, cell.here]
      plgpu.copy_smem_to_gmem(here.own("bias_line"), target)
      plgpu.wait_smem_to_gmem(0)
    return position, sums

  _, sums = gpu_stream.each_head(plan, at, turn, (jnp.int32(0), sums))
  factors = {"d_k": cell.params.scale, "d_v": 1.0}
  for name, value in zip(summed, sums, strict=True):
    buffer = cell.own(f"{name[-1]}_rows") or cell.own("k_rows")
    gpu_sums.put(buffer, value, factors[name])
    target = refs[name].at[at.batch, cell.here, at.group]
    plgpu.copy_smem_to_gmem(buffer, target)
  plgpu.wait_smem_to_gmem(0)


def _visit_queries(wanted, cell, step, carry):
  """Adds what a tile of queries contributes."""
  sums, line = carry
  queries, cotangents = cell.rings
  buffers = cell.buffers(step)
  queries.wait(step.slot)
  read = lambda name: tiles.line(buffers[name].at[0], tiles.BY_COLUMN)
  scores = (cell.own("k_rows"), tiles.turned(buffers["q"]))
  if wanted != ("d_v",):
    d_s, p, d_logits = _gradients(
      cell,
      step,
      scores,
      lambda: (cell.own("v_rows"), tiles.turned(buffers["d_out"])),
      map(read, ("lse", "delta")),
    )
    factors = {"d_k": (d_s, buffers["q"]), "d_v": (p, buffers["d_out"])}
    line = tuple(total + jnp.sum(d_logits, axis=1) for total in line)
  else:
    logits = gpu_operands.logits(cell, step, tiles.product(*scores))
    p = logits.exp2(tiles.spread(read("lse"), cell.plan.tile, 1))
    cotangents.wait(step.slot)
    factors = {"d_v": (p.astype(scores[0].dtype), buffers["d_out"])}
  sums = gpu_sums.add(cell, sums, [factors[x] for x in wanted if x in factors])
  gpu_stream.release(step.slot, queries, cotangents)
  return sums, line
