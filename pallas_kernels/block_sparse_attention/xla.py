"""Block-sparse attention in plain XLA: work and memory follow the lists.

Forward keeps a running maximum and sum per query block (Milakov and
Gimelshein, arXiv 1805.02867). Backward walks the same lists once, keeps the
query gradient of the cell and adds key, value and bias gradients in place: the
loop is sequential, so it needs no transposed lists and recomputes each
probability only once (five products per block).

Meant for CPU, and correct everywhere; on GPU and TPU the loop leaves the chip
mostly idle. Shard over batch and heads with `jax.shard_map`.
"""

from jax import lax
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import blocks as walks
from pallas_kernels.block_sparse_attention import contract, numerics


def forward(operands, params):
  """See `contract`."""
  q, _, v, _, layout = operands
  dtype = contract.acc_dtype(q)
  total, cell_of = walks.cells(operands)
  size, width = layout.block_q, v.shape[-1]
  start = (
    jnp.full((size,), contract.MAX_INIT, dtype),
    jnp.zeros((size,), dtype),
    jnp.zeros((size, width), dtype),
  )

  def one_cell(n, results):
    out, lse = results
    cell = cell_of(n)
    query = walks.take(q, cell, cell.h, cell.i, size).astype(dtype)
    visit = _forward_visit(operands, params, cell, query)
    peak, mass, acc = walks.walk(operands, cell, visit, start)
    rows = acc / jnp.where(mass > 0, mass, 1)[:, None]
    out = walks.put(out, cell, cell.h, cell.i, rows.astype(q.dtype))
    line = jnp.where(mass > 0, jnp.log(mass) + peak, -jnp.inf)
    at = (cell.b, cell.h, cell.i * size)
    return out, lax.dynamic_update_slice(lse, line[None, None, :], at)

  batch, q_size, heads, _ = q.shape
  return lax.fori_loop(
    0,
    total,
    one_cell,
    (
      jnp.zeros((batch, q_size, heads, width), q.dtype),
      jnp.zeros((batch, heads, q_size), dtype),
    ),
  )


def _forward_visit(operands, params, cell, query):
  """One step of the online softmax."""
  layout, dtype = operands.layout, query.dtype

  def visit(state, blocks, mask):
    peak, mass, acc = state
    k = walks.keys(operands.k, layout, cell, blocks, dtype)
    v = walks.keys(operands.v, layout, cell, blocks, dtype)
    _, logits = walks.logits(operands, params, cell, query, blocks, k, mask)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
    p = jnp.exp(logits - new_peak[:, None])
    shrink = jnp.exp(peak - new_peak)
    acc = acc * shrink[:, None] + jnp.dot(p, v, precision=params.precision)
    return new_peak, mass * shrink + jnp.sum(p, axis=1), acc

  return visit


def backward(operands, params, lse, delta, d_out):
  """See `contract`."""
  q, k, v, bias, layout = operands
  dtype = contract.acc_dtype(q)
  total, cell_of = walks.cells(operands)

  def one_cell(n, grads):
    cell = cell_of(n)
    visit = _backward_visit(operands, params, cell, lse, delta, d_out)
    d_query = jnp.zeros((layout.block_q, q.shape[-1]), dtype)
    d_query, *rest = walks.walk(operands, cell, visit, (d_query,) + grads[1:])
    d_q = walks.put(grads[0], cell, cell.h, cell.i, d_query.astype(q.dtype))
    return (d_q, *rest)

  d_bias = None if bias is None else jnp.zeros(bias.shape, dtype)
  d_q, d_k, d_v, d_bias = lax.fori_loop(
    0,
    total,
    one_cell,
    (
      jnp.zeros(q.shape, q.dtype),
      jnp.zeros(k.shape, dtype),
      jnp.zeros(v.shape, dtype),
      d_bias,
    ),
  )
  return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), d_bias


def _backward_visit(operands, params, cell, lse, delta, d_out):
  """Adds the gradients of some blocks."""
  layout, dtype = operands.layout, contract.acc_dtype(operands.q)
  size, precision = layout.block_q, params.precision
  q = walks.take(operands.q, cell, cell.h, cell.i, size).astype(dtype)
  d_o = walks.take(d_out, cell, cell.h, cell.i, size).astype(dtype)
  lse = walks.take_line(lse, cell, cell.i, size)[:, None]
  delta = walks.take_line(delta, cell, cell.i, size)[:, None]

  def visit(state, blocks, mask):
    d_q, d_k, d_v, d_bias = state
    k = walks.keys(operands.k, layout, cell, blocks, dtype)
    v = walks.keys(operands.v, layout, cell, blocks, dtype)
    capped, logits = walks.logits(operands, params, cell, q, blocks, k, mask)
    p = jnp.exp(logits - lse)
    d_logits = p * (jnp.dot(d_o, v.T, precision=precision) - delta)
    d_s = params.scale * d_logits
    if params.soft_cap is not None:
      d_s = d_s * numerics.cap_slope(capped, params.soft_cap)
    d_q = d_q + jnp.dot(d_s, k, precision=precision)
    new_k = jnp.dot(d_s.T, q, precision=precision)
    new_v = jnp.dot(p.T, d_o, precision=precision)
    d_line = None if d_bias is None else jnp.sum(d_logits, axis=0)
    return d_q, *add_to_keys(
      layout, cell, blocks, (d_k, d_v, d_bias), (new_k, new_v, d_line)
    )

  return visit


def add_to_keys(layout, cell, blocks, sums, parts):
  """Adds rows (or lines) of several key blocks to gradients of all keys.

  In a loop with one update of each: XLA copies the whole array between two
  updates in one loop body, and updates in place otherwise.

  Args:
    layout: BlockLayout.
    cell: the query block.
    blocks: key block numbers.
    sums: tuple of `[B, K, G, D]` or `[B, H, K]` arrays, or None.
    parts: for each, `[len(blocks) * block_k, D]` or `[len(blocks) * block_k]`.

  Returns:
    The new sums.
  """
  size = layout.block_k

  def one(u, sums):
    j = jnp.stack(blocks)[u]
    new = []
    for total, part in zip(sums, parts, strict=True):
      if total is not None:
        part = lax.dynamic_slice_in_dim(part, u * size, size)
        if total.ndim == 4:
          total = walks.add(total, cell, cell.g, j, part)
        else:
          total = walks.add_line(total, cell, j, part)
      new.append(total)
    return tuple(new)

  if len(blocks) == 1:
    return one(0, tuple(sums))
  return lax.fori_loop(0, len(blocks), one, tuple(sums))


IMPLEMENTATIONS = (
  contract.Implementation(
    "xla", forward, backward, platforms=("cpu", "gpu", "tpu")
  ),
)
