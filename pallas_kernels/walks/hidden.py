"""What is hidden has no influence, also where it is not finite.

A kernel multiplies by zero what a mask hides, and 0 * NaN is NaN. So no kernel
is given NaN or infinities that it could multiply by zero; around every kernel:

*   Forward, a key is **bad** if a number of it or of its value is not finite.
    Its value becomes zero, and its logits NaN: masks act on logits by
    selection, so that NaN reaches the queries that see the key and no others.
*   Backward, a query is **bad** if a number of it, of its result or of its
    cotangent is not finite. It takes part with zeros and without probability:
    it gives keys and values no gradient. Its own is NaN, unless nothing
    depends on it (a cotangent of zeros).

Shapes are those of `contract.Operands`.
"""

import jax
from jax import numpy as jnp


def finite(*arrays):
  """Whether every number of each row is finite, `[..., n]` of `[..., n, d]`."""
  found = [jnp.all(jnp.isfinite(x), axis=-1) for x in arrays if x is not None]
  return jnp.stack(found).all(axis=0) if len(found) > 1 else found[0]


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
  v = None if v is None else zeroed(v, good)
  if bias is None:
    return operands._replace(k=jnp.where(good[..., None], k, jnp.nan), v=v)
  shown = of_queries(jnp.swapaxes(good, 1, 2), q.shape[2]) | _hides(bias)
  bias = jnp.where(shown, bias, jnp.nan)
  return operands._replace(k=zeroed(k, good), v=v, bias=bias)


def results(out, lse):
  """Results of a forward kernel: NaN as lse where `out` is not finite."""
  good = jnp.swapaxes(finite(out), 1, 2)
  return out, jnp.where(good, lse, jnp.nan)


def backward(operands):
  """Operands for a backward kernel: all finite, but for hiding biases."""
  q, k, v, bias, _ = operands
  good = finite(k, v)
  if bias is not None:
    bias = jnp.where(jnp.isfinite(bias) | _hides(bias), bias, 0)
  v = None if v is None else zeroed(v, good)
  return operands._replace(
    q=zeroed(q, finite(q)), k=zeroed(k, good), v=v, bias=bias
  )


def queries(lse, delta, d_out, d_lse):
  """Which queries give gradients to keys, and which get NaN: `[B, H, Q]`.

  Args:
    lse, delta, d_lse: `[B, H, Q]`.
    d_out: `[B, Q, H, Dv]`.
  """
  asked = jnp.any(d_out != 0, axis=-1)
  asked = jnp.swapaxes(asked, 1, 2) | (d_lse != 0)
  some = ~jnp.isneginf(lse)
  good = (jnp.isfinite(lse) | ~some) & jnp.isfinite(delta)
  good = good & jnp.swapaxes(finite(d_out), 1, 2)
  return good, ~good & asked & some


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
  good, nan = queries(lse, d_lse, d_out, d_lse)
  d_q = jnp.where(jnp.swapaxes(nan, 1, 2)[..., None], jnp.nan, 0)
  d_q = jnp.broadcast_to(d_q, q.shape).astype(q.dtype)
  d_out = zeroed(d_out, jnp.swapaxes(good, 1, 2))
  return d_out, jnp.where(good, d_lse, 0), d_q, None


poisoned.defvjp(_poisoned_fwd, _poisoned_bwd)
