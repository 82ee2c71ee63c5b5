"""Forward kernels of the mass sums for TPU: column sums and block sums."""

import functools

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.walks import tpu_call, tpu_operands, tpu_plan
from pallas_kernels.walks import tpu_tiles as tiles


def forward(params, operands, weights, lse, interpret=False):
  """See `xla.forward`; two kernels, of which an unused one is not run."""
  columns = _columns(params, operands, weights, lse, interpret)
  blocks = _blocks(params, operands, weights, lse, interpret)
  return columns, blocks


def _columns(params, operands, weights, lse, interpret):
  """Column sums `[B, H, K]`: keys against the queries that list them."""
  plan = tpu_plan.make(operands, keys_resident=True)
  arrays = tpu_operands.Arrays(plan, operands)
  k, rows = arrays.k, (plan.pack, plan.block_k, tiles.LANES)
  resident = {"k": arrays.blocked_rows(k), **arrays.resident_ids()}
  scratch = {"sum": (rows, jnp.float32), **arrays.id_scratch()}
  if plan.has_bias:
    resident["bias_lines"] = arrays.blocked_lines(arrays.bias)
    scratch["bias"] = (rows, jnp.float32)
  shape = (plan.batch, plan.packs, plan.k_blocks, plan.pack, plan.block_k)
  outputs = {
    "columns": arrays.blocked_lines(jax.ShapeDtypeStruct(shape, jnp.float32))
  }
  (columns,) = tpu_call.run(
    plan,
    "attention_mass_columns",
    functools.partial(_columns_body, plan, params),
    arrays.layout,
    resident,
    arrays.streamed_queries(lse=lse * tiles.LOG2E, weight=weights),
    outputs,
    scratch,
    tpu_call.cost(plan, 2, tpu_call.nbytes(k, outputs["columns"].array)),
    interpret,
  )
  return tpu_call.unlines(columns)


def _columns_body(plan, params, refs, at, n, walk):
  """One block of keys against one pack of the heads that share it."""
  del n
  refs["sum"][...] = jnp.zeros_like(refs["sum"])
  tpu_operands.read_ids(refs)
  if plan.has_bias:
    tiles.columns_of(refs["bias"], refs["bias_lines"])

  def visit(tile):
    for head in range(plan.pack):
      p, _, weight, _ = streamed_queries(plan, params, refs, tile, head)
      refs["sum"][head, tile.rows] += tiles.lane_sums(p * weight)

  walk(lambda step: tiles.each_tile(plan, refs, at, step, visit))
  for head in range(plan.pack):
    refs["columns"][head : head + 1] = tiles.line(
      tiles.total(refs["sum"][head])
    )


def streamed_queries(plan, params, refs, tile, head):
  """A tile of keys against queries.

  Returns:
    Probabilities, the slope of the soft cap or None, the queries' weights
    `[1, columns]`, and the queries.
  """
  buffer, rows, columns = tile.buffer, tile.rows, tile.columns
  q = refs["q"][buffer, head, columns]
  lse, weight = (
    refs[name][buffer, pl.ds(head, 1), columns] for name in ("lse", "weight")
  )
  bias = None
  if plan.has_bias:
    bias = tiles.spread(refs["bias"][head, rows], columns.size)
  s = tiles.product(refs["k"][0, rows], q, 1, 1, params.precision)
  value, slope = tiles.logits(params, s, bias)
  return jnp.exp2(tile.hide(value, head) - lse), slope, weight, q


def _blocks(params, operands, weights, lse, interpret):
  """Block sums `[B, H, q blocks, k blocks]`, by the lists of the queries."""
  plan = tpu_plan.make(operands)
  arrays = tpu_operands.Arrays(plan, operands)
  width = tpu_plan.lane_padded(plan.k_blocks)
  shape = (plan.batch, plan.packs, plan.q_blocks, plan.pack, width)
  resident, scratch = resident_queries(arrays, weights, lse)
  scratch["sum"] = ((plan.pack, width, tiles.LANES), jnp.float32)
  outputs = {"blocks": by_block(jax.ShapeDtypeStruct(shape, jnp.float32))}
  (blocks,) = tpu_call.run(
    plan,
    "attention_mass_blocks",
    functools.partial(_blocks_body, plan, params),
    arrays.layout,
    resident,
    arrays.streamed_keys(),
    outputs,
    scratch,
    tpu_call.cost(
      plan, 2, tpu_call.nbytes(resident["q"].array, outputs["blocks"].array)
    ),
    interpret,
  )
  blocks = jnp.swapaxes(blocks, 2, 3)[..., : plan.k_blocks]
  return blocks.reshape(plan.batch, -1, plan.q_blocks, plan.k_blocks)


def by_block(array):
  """Resident numbers per block of the other side, for each head of a pack.

  `array` is `[B, packs, resident blocks, pack, blocks, padded to lanes]`.
  """
  return tpu_call.Blocked(
    array,
    (None, None, None, *array.shape[3:]),
    lambda at: (at.batch, at.pack, at.block, 0, 0),
  )


def resident_queries(arrays, weights, lse):
  """Resident queries with their lse and weights, and scratch for these."""
  plan = arrays.plan
  lane_rows = ((plan.pack, plan.block_q, tiles.LANES), jnp.float32)
  lines = lambda x: arrays.blocked_lines(arrays.query_lines(x))
  resident = {
    "q": arrays.blocked_rows(arrays.q),
    "lse_lines": lines(lse * tiles.LOG2E),
    "weight_lines": lines(weights),
    **arrays.resident_ids(),
  }
  scratch = {"lse": lane_rows, "weight": lane_rows, **arrays.id_scratch()}
  return resident, scratch


def read_queries(refs):
  """Turns what belongs to the resident queries into columns."""
  tiles.columns_of(refs["lse"], refs["lse_lines"])
  tiles.columns_of(refs["weight"], refs["weight_lines"])
  tpu_operands.read_ids(refs)


def _blocks_body(plan, params, refs, at, n, walk):
  """One block of queries."""
  del n
  refs["sum"][...] = jnp.zeros_like(refs["sum"])
  read_queries(refs)

  def visit(tile):
    for head in range(plan.pack):
      p, _, weight, _ = streamed_keys(plan, params, refs, tile, head)
      line = jnp.sum(p * weight, axis=0, keepdims=True)
      for part, block in tile.parts():
        refs["sum"][head, pl.ds(block, 1)] += tiles.lane_sums(line[:, part])

  walk(lambda step: tiles.each_tile(plan, refs, at, step, visit))
  for head in range(plan.pack):
    refs["blocks"][head : head + 1] = tiles.line(tiles.total(refs["sum"][head]))


def streamed_keys(plan, params, refs, tile, head):
  """A tile of queries against keys.

  Returns:
    Probabilities, the slope of the soft cap or None, the queries' weights
    `[rows, columns]`, and the keys.
  """
  buffer, rows, columns = tile.buffer, tile.rows, tile.columns
  k = refs["k"][buffer, 0, columns]
  bias = None
  if plan.has_bias:
    bias = refs["bias"][buffer, pl.ds(head, 1), columns]
  lse, weight = (
    tiles.spread(refs[name][head, rows], columns.size)
    for name in ("lse", "weight")
  )
  s = tiles.product(refs["q"][head, rows], k, 1, 1, params.precision)
  value, slope = tiles.logits(params, s, bias)
  return jnp.exp2(tile.hide(value, head) - lse), slope, weight, k
