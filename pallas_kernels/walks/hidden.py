"""What is hidden has no influence, also where it is not finite.

A kernel multiplies by zero what a mask hides, and 0 * NaN is NaN. The XLA walks
select in every tile (`contract.Implementation.selects`). Other kernels are not
given NaN or infinities that they could multiply by zero; around each of them:

*   Forward, a key is **bad** if a number of it or of its value is not finite.
    Its value becomes zero, and its logits NaN: masks act on logits by
    selection, so that NaN reaches the queries that see the key and no others.
*   Backward, a query is **bad** if a number of it, of its result or of its
    cotangent is not finite. It takes part with zeros and without probability:
    it gives keys and values no gradient. Its own is NaN, unless nothing
    depends on it (a cotangent of zeros).

Shapes are those of `contract.Operands`.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp

# Times any finite numbers, so that their sum is finite too.
_SMALL = 2.0**-100


def finite(*arrays):
  """Whether every number of each row is finite, `[..., n]` of `[..., n, d]`.

  By a product, which a CPU does several times faster than `isfinite` and a
  reduction over short rows.
  """

  def one(x):
    x = lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    small = jnp.full(x.shape[-1:], _SMALL, x.dtype)
    return jnp.isfinite(jnp.matmul(x, small, precision="highest"))

  return functools.reduce(
    jnp.logical_and, [one(x) for x in arrays if x is not None]
  )


def plain(x):
  """x with zeros for numbers that are not finite."""
  return jnp.where(jnp.isfinite(x), x, 0)


def plain_bias(bias):
  """Biases with zeros for what is not finite, but for minus infinity."""
  return jnp.where(jnp.isfinite(bias) | _hides(bias), bias, 0)


def marks(dtype, *arrays):
  """0 for good rows of `[B, K, G, d]`, NaN for bad ones, `[B, G, K]`."""
  good = jnp.swapaxes(finite(*arrays), 1, 2)
  return jnp.where(good, 0, jnp.nan).astype(dtype)


def zeroed(x, good):
  """Rows `[..., n, d]` with zeros where not `good`, `[..., n]`."""
  return jnp.where(good[..., None], x, 0)


def of_queries(x, heads, axis=1):
  """Repeats what belongs to key heads for the query heads that share them."""
  return jnp.repeat(x, heads // x.shape[axis], axis=axis)


def forward(operands):
  """Operands for a forward kernel: bad keys have zeros and logits of NaN."""
  q, k, v, bias, _ = operands
  good = finite(k, v)

  def marked():
    cleaned = None if v is None else zeroed(v, good)
    if bias is None:
      return jnp.where(good[..., None], k, jnp.nan), cleaned, None
    shown = of_queries(jnp.swapaxes(good, 1, 2), q.shape[2]) | _hides(bias)
    return zeroed(k, good), cleaned, jnp.where(shown, bias, jnp.nan)

  k, v, bias = lax.cond(good.all(), lambda: (k, v, bias), marked)
  return operands._replace(k=k, v=v, bias=bias)


def results(out, lse):
  """Results of a forward kernel: NaN as lse where `out` is not finite."""
  good = jnp.swapaxes(finite(out), 1, 2)
  return out, jnp.where(good, lse, jnp.nan)


def backward(operands):
  """Operands for a backward kernel: all finite, but for hiding biases."""
  q, k, v, bias, _ = operands
  asking, good = finite(q), finite(k, v)
  fine = asking.all() & good.all()
  if bias is not None:
    fine = fine & (jnp.isfinite(bias) | _hides(bias)).all()

  def cleaned():
    return (
      zeroed(q, asking),
      zeroed(k, good),
      None if v is None else zeroed(v, good),
      None if bias is None else plain_bias(bias),
    )

  q, k, v, bias = lax.cond(fine, lambda: (q, k, v, bias), cleaned)
  return operands._replace(q=q, k=k, v=v, bias=bias)


def queries(lse, delta, d_out):
  """Queries that give gradients to keys, bool `[B, H, Q]`.

  Args:
    lse, delta: `[B, H, Q]`.
    d_out: `[B, Q, H, Dv]`.
  """
  good = (jnp.isfinite(lse) | jnp.isneginf(lse)) & jnp.isfinite(delta)
  return good & jnp.swapaxes(finite(d_out), 1, 2)


def without_bad(d_out, good):
  """`d_out` with zeros for queries that are not `good`."""
  rows = jnp.swapaxes(good, 1, 2)
  return lax.cond(good.all(), lambda: d_out, lambda: zeroed(d_out, rows))


def with_nan(d_q, good, lse, d_out, d_lse):
  """Gradients of queries: NaN for bad ones on which something depends.

  Args:
    d_q: `[B, Q, H, D]`.
    good: of `queries`.
    lse, d_out, d_lse: results of forward, and cotangents as given.
  """

  def marked():
    asked = jnp.any(d_out != 0, axis=-1)
    asked = jnp.swapaxes(asked, 1, 2) | (d_lse != 0)
    bad = ~good & asked & ~jnp.isneginf(lse)
    return jnp.where(jnp.swapaxes(bad, 1, 2)[..., None], jnp.nan, d_q)

  return lax.cond(good.all(), lambda: d_q, marked)


def _hides(bias):
  return jnp.isneginf(bias)


@jax.custom_vjp
def poisoned(out, lse, q, bad):
  """Results with NaN where queries are `bad`, and gradients as a kernel's.

  For implementations whose gradients autodiff makes: they compute on operands
  of `backward`, and say themselves which queries see something bad.

  Args:
    out: `[B, Q, H, Dv]`.
    lse: `[B, H, Q]`.
    q: `[B, Q, H, D]`, as given by the caller.
    bad: bool `[B, H, Q]`.
  """
  rows = jnp.swapaxes(bad, 1, 2)[..., None]
  return jnp.where(rows, jnp.nan, out), jnp.where(bad, jnp.nan, lse)


def _poisoned_fwd(out, lse, q, bad):
  return poisoned(out, lse, q, bad), (lse, q, bad)


def _poisoned_bwd(kept, cotangents):
  lse, q, bad = kept
  d_out, d_lse = cotangents
  lse = jnp.where(bad, jnp.nan, lse)
  good = queries(lse, d_lse, d_out)
  d_q = with_nan(jnp.zeros_like(q), good, lse, d_out, d_lse)
  return without_bad(d_out, good), jnp.where(good, d_lse, 0), d_q, None


poisoned.defvjp(_poisoned_fwd, _poisoned_bwd)
