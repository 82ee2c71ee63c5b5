"""Backward kernels for TPU.

Two passes, each recomputing the probabilities from lse: queries against their
key blocks for d_q, and keys against the query blocks that list them (the
transposed lists) for d_k, d_v and d_bias. Nothing is accumulated in HBM.
"""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.walks import tpu_call, tpu_operands, tpu_plan
from pallas_kernels.walks import tpu_tiles as tiles


def backward(operands, params, lse, delta, d_out, interpret=False):
  """See `contract`."""
  d_q = _queries(operands, params, lse, delta, d_out, interpret)
  d_k, d_v, d_bias = _keys(operands, params, lse, delta, d_out, interpret)
  return d_q, d_k, d_v, d_bias


def _queries(operands, params, lse, delta, d_out, interpret):
  """d_q, by the lists of the query blocks."""
  plan = tpu_plan.make(operands)
  arrays = tpu_operands.Arrays(plan, operands)
  q, d_out = arrays.q, arrays.d_out(d_out)
  rows = (plan.pack, plan.block_q)
  lane_rows = (rows + (tiles.LANES,), jnp.float32)
  resident = {
    "q": arrays.blocked_rows(q),
    "d_out": arrays.blocked_rows(d_out),
    "lse_lines": arrays.blocked_lines(arrays.query_lines(lse * tiles.LOG2E)),
    "delta_lines": arrays.blocked_lines(arrays.query_lines(delta)),
    **arrays.resident_ids(),
  }
  outputs = {"d_q": arrays.blocked_rows(tpu_operands.shape_like(q))}
  scratch = {
    "lse": lane_rows,
    "delta": lane_rows,
    "sum": (rows + (plan.d,), jnp.float32),
    **arrays.id_scratch(),
  }
  (d_q,) = tpu_call.run(
    plan,
    "block_sparse_attention_d_q",
    functools.partial(_queries_body, plan, params),
    arrays.layout,
    resident,
    arrays.streamed_keys(),
    outputs,
    scratch,
    tpu_call.cost(plan, 3, tpu_call.nbytes(q, q, d_out)),
    interpret,
  )
  return tpu_call.heads_last(d_q, operands.q.shape[-1])


def _queries_body(plan, params, refs, at, n, walk):
  """One block of queries."""
  del n
  refs["sum"][...] = jnp.zeros_like(refs["sum"])
  tiles.columns_of(refs["lse"], refs["lse_lines"])
  tiles.columns_of(refs["delta"], refs["delta_lines"])
  tpu_operands.read_ids(refs)

  walk(
    lambda step: tiles.each_tile(
      plan, refs, at, step, functools.partial(_visit_keys, plan, params, refs)
    )
  )
  refs["d_q"][...] = (params.scale * refs["sum"][...]).astype(refs["d_q"].dtype)


def _visit_keys(plan, params, refs, tile):
  """Adds what a tile contributes to d_q."""
  buffer, rows, columns = tile.buffer, tile.rows, tile.columns
  k, v = (refs[name][buffer, 0, columns] for name in "kv")
  for head in range(plan.pack):
    bias = None
    if plan.has_bias:
      bias = refs["bias"][buffer, pl.ds(head, 1), columns]
    lse, delta = (
      tiles.spread(refs[name][head, rows], columns.size)
      for name in ("lse", "delta")
    )
    _, d_s, _ = _gradients(
      params,
      tile,
      head,
      (refs["q"][head, rows], refs["d_out"][head, rows]),
      (k, v),
      bias,
      lse,
      delta,
    )
    refs["sum"][head, rows] += tiles.product(
      d_s.astype(k.dtype), k, 1, 0, params.precision
    )


def _gradients(params, tile, head, resident, streamed, bias, lse, delta):
  """Probabilities, d_scores (without scale) and d_logits of a tile.

  `resident` and `streamed` are what is multiplied for the scores and for
  d_out . v: `(q, d_out)` and `(k, v)`, or the other way round.
  """
  s = tiles.product(resident[0], streamed[0], 1, 1, params.precision)
  value, slope = tiles.logits(params, s, bias)
  p = jnp.exp2(tile.hide(value, head) - lse)
  d_p = tiles.product(resident[1], streamed[1], 1, 1, params.precision)
  d_logits = p * (d_p - delta)
  return p, d_logits if slope is None else d_logits * slope, d_logits


def _keys(operands, params, lse, delta, d_out, interpret):
  """d_k, d_v and d_bias, by the transposed lists."""
  plan = tpu_plan.make(operands, keys_resident=True)
  arrays = tpu_operands.Arrays(plan, operands)
  k, v = arrays.k, arrays.v
  resident = {
    "k": arrays.blocked_rows(k),
    "v": arrays.blocked_rows(v),
    **arrays.resident_ids(),
  }
  outputs = {
    "d_k": arrays.blocked_rows(tpu_operands.shape_like(k)),
    "d_v": arrays.blocked_rows(tpu_operands.shape_like(v)),
  }
  scratch = {
    "sum_k": ((plan.block_k, plan.d), jnp.float32),
    "sum_v": ((plan.block_k, plan.dv), jnp.float32),
    **arrays.id_scratch(),
  }
  if plan.has_bias:
    bias = arrays.blocked_lines(arrays.bias)
    resident["bias_lines"] = bias
    outputs["d_bias"] = arrays.blocked_lines(
      tpu_operands.shape_like(bias.array)
    )
    rows = (plan.pack, plan.block_k, tiles.LANES)
    scratch |= {"bias": (rows, jnp.float32), "sum_bias": (rows, jnp.float32)}
  d_k, d_v, *d_bias = tpu_call.run(
    plan,
    "block_sparse_attention_d_kv",
    functools.partial(_keys_body, plan, params),
    arrays.layout,
    resident,
    arrays.streamed_queries(d_out, lse=lse * tiles.LOG2E, delta=delta),
    outputs,
    scratch,
    tpu_call.cost(plan, 4, tpu_call.nbytes(k, k, v, v)),
    interpret,
  )
  d_bias = tpu_call.unlines(d_bias[0]) if d_bias else None
  return (
    tpu_call.heads_last(d_k, operands.k.shape[-1]),
    tpu_call.heads_last(d_v, operands.v.shape[-1]),
    d_bias,
  )


def _keys_body(plan, params, refs, at, n, walk):
  """One block of keys against one pack of the heads that share it."""
  turn = lax.rem(n, plan.turns)

  @pl.when(turn == 0)
  def _():
    for name in ("sum_k", "sum_v"):
      refs[name][...] = jnp.zeros_like(refs[name])

  tpu_operands.read_ids(refs)
  if plan.has_bias:
    tiles.columns_of(refs["bias"], refs["bias_lines"])
    refs["sum_bias"][...] = jnp.zeros_like(refs["sum_bias"])

  walk(
    lambda step: tiles.each_tile(
      plan,
      refs,
      at,
      step,
      functools.partial(_visit_queries, plan, params, refs),
    )
  )

  @pl.when(turn == plan.turns - 1)
  def _():
    refs["d_k"][0] = (params.scale * refs["sum_k"][...]).astype(
      refs["d_k"].dtype
    )
    refs["d_v"][0] = refs["sum_v"][...].astype(refs["d_v"].dtype)

  if plan.has_bias:
    for head in range(plan.pack):
      refs["d_bias"][head : head + 1] = tiles.line(
        tiles.total(refs["sum_bias"][head])
      )


def _visit_queries(plan, params, refs, tile):
  """Adds what a tile contributes to d_k, d_v and d_bias."""
  buffer, rows, columns = tile.buffer, tile.rows, tile.columns
  keys = (refs["k"][0, rows], refs["v"][0, rows])
  for head in range(plan.pack):
    q = refs["q"][buffer, head, columns]
    d_out = refs["d_out"][buffer, head, columns]
    lse, delta = (
      refs[name][buffer, pl.ds(head, 1), columns] for name in ("lse", "delta")
    )
    bias = None
    if plan.has_bias:
      bias = tiles.spread(refs["bias"][head, rows], columns.size)
    p, d_s, d_logits = _gradients(
      params, tile, head, keys, (q, d_out), bias, lse, delta
    )
    refs["sum_v"][rows] += tiles.product(
      p.astype(d_out.dtype), d_out, 1, 0, params.precision
    )
    refs["sum_k"][rows] += tiles.product(
      d_s.astype(q.dtype), q, 1, 0, params.precision
    )
    if plan.has_bias:
      refs["sum_bias"][head, rows] += tiles.lane_sums(d_logits)
