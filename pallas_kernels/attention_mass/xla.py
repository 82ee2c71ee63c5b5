"""Mass sums in plain XLA: one walk over the lists, products of q and k only."""

from jax import lax
from jax import numpy as jnp

from pallas_kernels.walks import blocks as walks
from pallas_kernels.walks import contract, hidden, numerics


def forward(params, operands, weights, lse):
  """Column sums and block sums.

  lse is +inf in rows without probability, NaN in those that give no number.
  """
  layout, dtype = operands.layout, contract.acc_dtype(operands.q)
  size = layout.block_k
  marks = hidden.marks(dtype, operands.k)
  total, bundle = walks.bundles(operands)

  def one_bundle(n, sums):
    cells = bundle(n)
    row = _Rows(operands, cells, weights, lse)

    def visit(sums, blocks, mask):
      k = walks.keys(operands.k, layout, cells, blocks, dtype)
      _, logits = walks.logits(
        operands, params, cells, row.q, blocks, k, mask, marks
      )
      mass = jnp.exp(logits - row.lse) * row.weight
      line = jnp.sum(walks.by_head(operands, mass), axis=1)
      whole = jnp.sum(line.reshape(*line.shape[:2], -1, size), axis=-1)
      return walks.add_to_keys(cells, blocks, sums, (line, whole))

    return walks.walk(operands, cells, visit, sums)

  batch, _, heads, _ = operands.q.shape
  return lax.fori_loop(
    0,
    total,
    one_bundle,
    (
      jnp.zeros((batch, heads, operands.k.shape[1]), dtype),
      jnp.zeros((batch, heads, layout.q_blocks, layout.k_blocks), dtype),
    ),
  )


class _Rows:
  """What belongs to the queries of a bundle."""

  def __init__(self, operands, cells, weights, lse):
    dtype = contract.acc_dtype(operands.q)
    line = lambda x: walks.take_line(operands, x, cells)[..., None]
    rows = walks.take(operands, operands.q, cells)
    self.lse, self.weight = line(lse), line(weights)
    # Logits of a bad query are NaN, and nothing else of it: exp(logit - lse) of
    # what a mask hides from it stays 0.
    bad = jnp.isnan(self.lse)
    self.q = jnp.where(bad, jnp.nan, hidden.plain(rows.astype(dtype)))
    self.lse = jnp.where(bad, 0, self.lse)


def backward(params, operands, weights, lse, d_columns, d_blocks):
  """Gradients of q, k, bias, and r (see `op`)."""
  q, k, _, bias, layout = operands
  dtype = contract.acc_dtype(q)
  total, bundle = walks.bundles(operands)

  def one_bundle(n, grads):
    d_q, *sums, r = grads
    cells = bundle(n)
    row = _Rows(operands, cells, weights, lse)
    visit = _backward_visit(operands, params, cells, row, d_columns, d_blocks)
    state = (
      jnp.zeros_like(row.q),
      *sums,
      jnp.zeros(row.q.shape[:2], dtype),
    )
    d_query, *sums, line = walks.walk(operands, cells, visit, state)
    d_q = walks.put(operands, d_q, cells, d_query.astype(q.dtype))
    return d_q, *sums, walks.put(operands, r, cells, line)

  d_bias = None if bias is None else jnp.zeros(bias.shape, dtype)
  d_q, d_k, d_bias, r = lax.fori_loop(
    0,
    total,
    one_bundle,
    (
      jnp.zeros(q.shape, q.dtype),
      walks.key_sums(k, layout.block_k, dtype),
      d_bias,
      jnp.zeros(lse.shape, dtype),
    ),
  )
  return d_q, walks.by_token(d_k, k), d_bias, r


def _backward_visit(operands, params, cells, row, d_columns, d_blocks):
  """Adds the gradients of some blocks."""
  layout, size = operands.layout, operands.layout.block_k
  heads = walks.heads_of(operands, cells)
  by_block = d_blocks[cells.b[:, None], heads, cells.i[:, None]]

  def visit(state, blocks, mask):
    d_q, *sums, r = state
    k = walks.finite_keys(operands.k, layout, cells, blocks, row.q.dtype)
    capped, logits = walks.logits(
      operands, params, cells, row.q, blocks, k, mask
    )
    g = jnp.take_along_axis(by_block, blocks[:, None], axis=2)
    g = jnp.repeat(g, size, axis=2)[:, None]
    g = g + walks.take_keys(operands, d_columns, cells, blocks)
    p = jnp.exp(logits - row.lse)
    pg = (walks.by_head(operands, p) * g).reshape(p.shape)
    d_logits = pg * row.weight
    d_s = params.scale * d_logits
    if params.soft_cap is not None:
      d_s = d_s * numerics.cap_slope(capped, params.soft_cap)
    d_q = d_q + jnp.matmul(d_s, k, precision=params.precision)
    parts = (
      jnp.matmul(row.q.mT, d_s, precision=params.precision),
      jnp.sum(walks.by_head(operands, d_logits), axis=1),
    )
    sums = walks.add_to_keys(cells, blocks, sums, parts)
    return d_q, *sums, r + jnp.sum(pg, axis=-1)

  return visit


IMPLEMENTATIONS = (
  contract.Implementation(
    "xla", forward, backward, platforms=("cpu", "gpu", "tpu"), selects=True
  ),
)
