"""Block-sparse attention in plain XLA: work and memory follow the lists.

Forward keeps a running maximum and sum per query (Milakov and Gimelshein, arXiv
1805.02867). Backward walks the same lists once, keeps the query gradients of a
bundle of query blocks and adds key, value and bias gradients in place: bundles
follow each other, so that it needs no transposed lists and recomputes each
probability only once (five products per block).

Made for CPU, and correct everywhere. Shard over batch and heads with
`jax.shard_map`.
"""

from jax import lax
from jax import numpy as jnp

from pallas_kernels.walks import blocks as walks
from pallas_kernels.walks import contract, hidden, numerics


def forward(operands, params):
  """See `contract`."""
  q, _, v, _, _ = operands
  dtype = contract.acc_dtype(q)
  total, bundle = walks.bundles(operands)
  width = v.shape[-1]
  marks = hidden.marks(dtype, operands.k, v)

  def one_bundle(n, results):
    out, lse = results
    cells = bundle(n)
    query = walks.take(operands, q, cells).astype(dtype)
    line = query.shape[:2]
    start = (
      jnp.full(line, contract.MAX_INIT, dtype),
      jnp.zeros(line, dtype),
      jnp.zeros(line + (width,), dtype),
    )
    visit = _forward_visit(operands, params, cells, query, marks)
    peak, mass, acc = walks.walk(operands, cells, visit, start)
    rows = acc / jnp.where(mass > 0, mass, 1)[..., None]
    out = walks.put(operands, out, cells, rows.astype(q.dtype))
    line = jnp.where(mass > 0, jnp.log(mass) + peak, -jnp.inf)
    return out, walks.put(operands, lse, cells, line)

  batch, q_size, heads, _ = q.shape
  return lax.fori_loop(
    0,
    total,
    one_bundle,
    (
      jnp.zeros((batch, q_size, heads, width), q.dtype),
      jnp.zeros((batch, heads, q_size), dtype),
    ),
  )


def _forward_visit(operands, params, cells, query, marks):
  """One step of the online softmax."""
  layout, dtype = operands.layout, query.dtype

  def visit(state, blocks, mask):
    peak, mass, acc = state
    k = walks.keys(operands.k, layout, cells, blocks, dtype)
    v = walks.finite_keys(operands.v, layout, cells, blocks, dtype)
    _, logits = walks.logits(
      operands, params, cells, query, blocks, k, mask, marks
    )
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
    p = jnp.exp(logits - new_peak[..., None])
    shrink = jnp.exp(peak - new_peak)
    product = jnp.matmul(p, v, precision=params.precision)
    acc = acc * shrink[..., None] + product
    return new_peak, mass * shrink + jnp.sum(p, axis=-1), acc

  return visit


def backward(operands, params, lse, delta, d_out):
  """See `contract`."""
  q, k, v, bias, layout = operands
  dtype = contract.acc_dtype(q)
  total, bundle = walks.bundles(operands)

  def one_bundle(n, grads):
    cells = bundle(n)
    visit, query = _backward_visit(operands, params, cells, lse, delta, d_out)
    state = (jnp.zeros_like(query),) + grads[1:]
    d_query, *rest = walks.walk(operands, cells, visit, state)
    d_query = d_query.astype(q.dtype)
    return walks.put(operands, grads[0], cells, d_query), *rest

  d_bias = None if bias is None else jnp.zeros(bias.shape, dtype)
  d_q, d_k, d_v, d_bias = lax.fori_loop(
    0,
    total,
    one_bundle,
    (
      jnp.zeros(q.shape, q.dtype),
      walks.key_sums(k, layout.block_k, dtype),
      walks.key_sums(v, layout.block_k, dtype),
      d_bias,
    ),
  )
  return d_q, walks.by_token(d_k, k), walks.by_token(d_v, v), d_bias


def _backward_visit(operands, params, cells, lse, delta, d_out):
  """The visit that adds the gradients of some blocks, and the queries."""
  layout, dtype = operands.layout, contract.acc_dtype(operands.q)
  precision = params.precision
  take = lambda x: walks.take(operands, x, cells).astype(dtype)
  take_line = lambda x: walks.take_line(operands, x, cells)[..., None]
  q, d_o, lse, delta = (
    hidden.plain(take(operands.q)),
    take(d_out),
    take_line(lse),
    take_line(delta),
  )

  def visit(state, blocks, mask):
    d_q, *sums = state
    k = walks.finite_keys(operands.k, layout, cells, blocks, dtype)
    v = walks.finite_keys(operands.v, layout, cells, blocks, dtype)
    capped, logits = walks.logits(operands, params, cells, q, blocks, k, mask)
    p = jnp.exp(logits - lse)
    d_logits = p * (jnp.matmul(d_o, v.mT, precision=precision) - delta)
    d_s = params.scale * d_logits
    if params.soft_cap is not None:
      d_s = d_s * numerics.cap_slope(capped, params.soft_cap)
    parts = (
      jnp.matmul(q.mT, d_s, precision=precision),
      jnp.matmul(d_o.mT, p, precision=precision),
      jnp.sum(walks.by_head(operands, d_logits), axis=1),
    )
    d_q = d_q + jnp.matmul(d_s, k, precision=precision)
    return d_q, *walks.add_to_keys(cells, blocks, sums, parts)

  return visit, q


IMPLEMENTATIONS = (
  contract.Implementation(
    "xla", forward, backward, platforms=("cpu", "gpu", "tpu"), selects=True
  ),
)
