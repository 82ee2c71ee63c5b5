"""Mass sums in plain XLA: one walk over the lists, products of q and k only."""

from jax import lax
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import blocks as walks
from pallas_kernels.block_sparse_attention import contract, numerics
from pallas_kernels.block_sparse_attention import xla as attention


def forward(params, operands, weights, lse):
  """Column sums and block sums; lse is +inf in rows without probability."""
  layout, dtype = operands.layout, contract.acc_dtype(operands.q)
  total, cell_of = walks.cells(operands)

  def one_cell(n, sums):
    cell = cell_of(n)
    row = _Row(operands, cell, weights, lse)

    def visit(sums, blocks, mask):
      k = walks.keys(operands.k, layout, cell, blocks, dtype)
      _, logits = walks.logits(operands, params, cell, row.q, blocks, k, mask)
      line = jnp.sum(jnp.exp(logits - row.lse) * row.weight, axis=0)
      return _spread(layout, cell, blocks, sums, line)

    return walks.walk(operands, cell, visit, sums)

  batch, _, heads, _ = operands.q.shape
  return lax.fori_loop(
    0,
    total,
    one_cell,
    (
      jnp.zeros((batch, heads, operands.k.shape[1]), dtype),
      jnp.zeros((batch, heads, layout.q_blocks, layout.k_blocks), dtype),
    ),
  )


class _Row:
  """What belongs to the queries of one cell."""

  def __init__(self, operands, cell, weights, lse):
    size = operands.layout.block_q
    dtype = contract.acc_dtype(operands.q)
    self.q = walks.take(operands.q, cell, cell.h, cell.i, size).astype(dtype)
    self.lse = walks.take_line(lse, cell, cell.i, size)[:, None]
    self.weight = walks.take_line(weights, cell, cell.i, size)[:, None]


def _spread(layout, cell, blocks, sums, line):
  """Adds a line of column sums to both results, one block per turn."""
  size = layout.block_k

  def one(u, sums):
    columns, by_block = sums
    j = jnp.stack(blocks)[u]
    part = lax.dynamic_slice_in_dim(line, u * size, size)
    whole = jnp.sum(part).reshape(1, 1, 1, 1)
    by_block = lax.dynamic_update_slice(
      by_block, whole, (cell.b, cell.h, cell.i, j)
    )
    return walks.add_line(columns, cell, j, part), by_block

  return lax.fori_loop(0, len(blocks), one, sums)


def backward(params, operands, weights, lse, d_columns, d_blocks):
  """Gradients of q, k, bias, and r (see `op`)."""
  q, k, _, bias, layout = operands
  dtype = contract.acc_dtype(q)
  total, cell_of = walks.cells(operands)

  def one_cell(n, grads):
    d_q, d_k, d_bias, r = grads
    cell = cell_of(n)
    visit = _backward_visit(
      operands,
      params,
      cell,
      _Row(operands, cell, weights, lse),
      d_columns,
      d_blocks,
    )
    d_query, d_k, d_bias, line = walks.walk(
      operands,
      cell,
      visit,
      (
        jnp.zeros((layout.block_q, q.shape[-1]), dtype),
        d_k,
        d_bias,
        jnp.zeros((layout.block_q,), dtype),
      ),
    )
    d_q = walks.put(d_q, cell, cell.h, cell.i, d_query.astype(q.dtype))
    return d_q, d_k, d_bias, walks.add_line(r, cell, cell.i, line)

  d_bias = None if bias is None else jnp.zeros(bias.shape, dtype)
  d_q, d_k, d_bias, r = lax.fori_loop(
    0,
    total,
    one_cell,
    (
      jnp.zeros(q.shape, q.dtype),
      jnp.zeros(k.shape, dtype),
      d_bias,
      jnp.zeros(lse.shape, dtype),
    ),
  )
  return d_q, d_k.astype(k.dtype), d_bias, r


def _backward_visit(operands, params, cell, row, d_columns, d_blocks):
  """Adds the gradients of some blocks."""
  layout, size = operands.layout, operands.layout.block_k
  by_block = d_blocks[cell.b, cell.h, cell.i]

  def visit(state, blocks, mask):
    d_q, d_k, d_bias, r = state
    k = walks.keys(operands.k, layout, cell, blocks, row.q.dtype)
    capped, logits = walks.logits(
      operands, params, cell, row.q, blocks, k, mask
    )
    g = jnp.concatenate(
      [walks.take_line(d_columns, cell, j, size) + by_block[j] for j in blocks]
    )
    pg = jnp.exp(logits - row.lse) * g[None, :]
    d_logits = pg * row.weight
    d_s = params.scale * d_logits
    if params.soft_cap is not None:
      d_s = d_s * numerics.cap_slope(capped, params.soft_cap)
    d_q = d_q + jnp.dot(d_s, k, precision=params.precision)
    new_k = jnp.dot(d_s.T, row.q, precision=params.precision)
    line = None if d_bias is None else jnp.sum(d_logits, axis=0)
    d_k, d_bias = attention.add_to_keys(
      layout, cell, blocks, (d_k, d_bias), (new_k, line)
    )
    return d_q, d_k, d_bias, r + jnp.sum(pg, axis=1)

  return visit


IMPLEMENTATIONS = (
  contract.Implementation(
    "xla", forward, backward, platforms=("cpu", "gpu", "tpu")
  ),
)
