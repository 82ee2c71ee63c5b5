"""Backward kernels of the mass sums for TPU; see `op` for the formulas.

`g = d_columns + d_blocks` is put together in each tile: d_columns lies along
the keys, and of d_blocks a cell holds its own row (or column) of blocks.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention_mass import tpu_forward
from pallas_kernels.walks import canonical, tpu_call, tpu_operands, tpu_plan
from pallas_kernels.walks import tpu_tiles as tiles


def backward(
  params, operands, weights, lse, d_columns, d_blocks, interpret=False
):
  """See `xla.backward`."""
  call = params, operands, weights, lse, d_columns, d_blocks, interpret
  d_q, r = _queries(*call)
  d_k, d_bias = _keys(*call)
  return d_q, d_k, d_bias, r


def _block_lines(plan, x):
  """`[B, H, resident blocks, blocks]` as `tpu_forward.by_block` wants it."""
  x = canonical.padded(x, -1, tpu_plan.lane_padded(x.shape[-1]))
  x = x.reshape(plan.batch, plan.packs, plan.pack, *x.shape[2:])
  return tpu_forward.by_block(jnp.swapaxes(x, 2, 3))


def _queries(params, operands, weights, lse, d_columns, d_blocks, interpret):
  """d_q and r, by the lists of the query blocks."""
  plan = tpu_plan.make(operands)
  arrays = tpu_operands.Arrays(plan, operands)
  resident, scratch = tpu_forward.resident_queries(arrays, weights, lse)
  resident["block_lines"] = _block_lines(plan, d_blocks)
  width = resident["block_lines"].array.shape[-1]
  rows = (plan.pack, plan.block_q)
  scratch |= {
    "blocks": ((plan.pack, width, tiles.LANES), jnp.float32),
    "sum": (rows + (plan.d,), jnp.float32),
    "sum_r": (rows + (tiles.LANES,), jnp.float32),
  }
  q, line = resident["q"].array, resident["lse_lines"].array
  d_q, r = tpu_call.run(
    plan,
    "attention_mass_d_q",
    functools.partial(_queries_body, plan, params),
    arrays.layout,
    resident,
    arrays.streamed_keys() | {"g": arrays.streamed_line(d_columns)},
    {
      "d_q": arrays.blocked_rows(tpu_operands.shape_like(q)),
      "r": arrays.blocked_lines(tpu_operands.shape_like(line, jnp.float32)),
    },
    scratch,
    tpu_call.cost(plan, 4, tpu_call.nbytes(q, q)),
    interpret,
  )
  return tpu_call.heads_last(d_q, operands.q.shape[-1]), tpu_call.unlines(r)


def _queries_body(plan, params, refs, at, n, walk):
  """One block of queries."""
  del n
  for name in ("sum", "sum_r"):
    refs[name][...] = jnp.zeros_like(refs[name])
  tpu_forward.read_queries(refs)
  tiles.columns_of(refs["blocks"], refs["block_lines"])

  def visit(tile):
    for head in range(plan.pack):
      p, slope, weight, k = tpu_forward.streamed_keys(
        plan, params, refs, tile, head
      )
      own = refs["g"][tile.buffer, pl.ds(head, 1), tile.columns]
      pg = p * (own + _of_blocks(refs, tile, head))
      refs["sum_r"][head, tile.rows] += tiles.lane_sums(pg)
      d_s = pg * weight if slope is None else pg * weight * slope
      refs["sum"][head, tile.rows] += tiles.product(
        d_s.astype(k.dtype), k, 1, 0, params.precision
      )

  walk(lambda step: tiles.each_tile(plan, refs, at, step, visit))
  refs["d_q"][...] = (params.scale * refs["sum"][...]).astype(refs["d_q"].dtype)
  for head in range(plan.pack):
    refs["r"][head : head + 1] = tiles.line(tiles.total(refs["sum_r"][head]))


def _of_blocks(refs, tile, head):
  """The numbers of the streamed blocks of a tile, `[1, columns]`."""
  return jnp.concatenate(
    [
      tiles.spread(
        refs["blocks"][head, pl.ds(block, 1)], part.stop - part.start
      )
      for part, block in tile.parts()
    ],
    axis=1,
  )


def _keys(params, operands, weights, lse, d_columns, d_blocks, interpret):
  """d_k and d_bias, by the transposed lists."""
  plan = tpu_plan.make(operands, keys_resident=True)
  arrays = tpu_operands.Arrays(plan, operands)
  k, rows = arrays.k, (plan.pack, plan.block_k, tiles.LANES)
  g = tpu_call.lines(d_columns, plan.pack, plan.block_k)
  resident = {
    "k": arrays.blocked_rows(k),
    "g_lines": arrays.blocked_lines(g),
    "block_lines": _block_lines(plan, jnp.swapaxes(d_blocks, -1, -2)),
    **arrays.resident_ids(),
  }
  width = resident["block_lines"].array.shape[-1]
  scratch = {
    "sum_k": ((plan.block_k, plan.d), jnp.float32),
    "g": (rows, jnp.float32),
    "blocks": ((plan.pack, width, tiles.LANES), jnp.float32),
    **arrays.id_scratch(),
  }
  outputs = {"d_k": arrays.blocked_rows(tpu_operands.shape_like(k))}
  if plan.has_bias:
    resident["bias_lines"] = arrays.blocked_lines(arrays.bias)
    shape = jax.ShapeDtypeStruct(g.shape, jnp.float32)
    outputs["d_bias"] = arrays.blocked_lines(shape)
    scratch |= {"bias": (rows, jnp.float32), "sum_bias": (rows, jnp.float32)}
  d_k, *d_bias = tpu_call.run(
    plan,
    "attention_mass_d_k",
    functools.partial(_keys_body, plan, params),
    arrays.layout,
    resident,
    arrays.streamed_queries(lse=lse * tiles.LOG2E, weight=weights),
    outputs,
    scratch,
    tpu_call.cost(plan, 4, tpu_call.nbytes(k, k)),
    interpret,
  )
  d_bias = tpu_call.unlines(d_bias[0]) if d_bias else None
  return tpu_call.heads_last(d_k, operands.k.shape[-1]), d_bias


def _keys_body(plan, params, refs, at, n, walk):
  """One block of keys against one pack of the heads that share it."""
  turn = lax.rem(n, plan.turns)

  @pl.when(turn == 0)
  def _():
    refs["sum_k"][...] = jnp.zeros_like(refs["sum_k"])

  tpu_operands.read_ids(refs)
  tiles.columns_of(refs["g"], refs["g_lines"])
  tiles.columns_of(refs["blocks"], refs["block_lines"])
  if plan.has_bias:
    tiles.columns_of(refs["bias"], refs["bias_lines"])
    refs["sum_bias"][...] = jnp.zeros_like(refs["sum_bias"])

  visit = functools.partial(_visit_queries, plan, params, refs)
  walk(lambda step: tiles.each_tile(plan, refs, at, step, visit))

  @pl.when(turn == plan.turns - 1)
  def _():
    refs["d_k"][0] = (params.scale * refs["sum_k"][...]).astype(
      refs["d_k"].dtype
    )

  if plan.has_bias:
    for head in range(plan.pack):
      refs["d_bias"][head : head + 1] = tiles.line(
        tiles.total(refs["sum_bias"][head])
      )


def _visit_queries(plan, params, refs, tile):
  """Adds what a tile contributes to d_k and d_bias."""
  rows = tile.rows
  for head in range(plan.pack):
    p, slope, weight, q = tpu_forward.streamed_queries(
      plan, params, refs, tile, head
    )
    own = tiles.spread(refs["g"][head, rows], tile.columns.size)
    d_logits = p * (own + _of_blocks(refs, tile, head)) * weight
    d_s = d_logits if slope is None else d_logits * slope
    refs["sum_k"][rows] += tiles.product(
      d_s.astype(q.dtype), q, 1, 0, params.precision
    )
    if plan.has_bias:
      refs["sum_bias"][head, rows] += tiles.lane_sums(d_logits)
