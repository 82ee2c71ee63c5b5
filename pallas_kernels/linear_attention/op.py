"""Custom VJP and vmap of linear attention on canonical operands.

With `w = exp(log_decay)`, `g = scale * d_out` and S[t] the state after token t,
the gradient G[t] of S[t] runs backward, from `d_last`:

    G[t - 1] = w * (G[t] + q[t]^T g[t])
    d_q[t] = S[t] g[t]      d_k[t] = (G[t] + q[t]^T g[t]) v[t]      d_v likewise

and every pair of tokens that a decay lies between gives log_decay its distance
times what it contributes. Kernels do this by tiles; see `tpu_backward`.

A token that is not finite has no influence on those before it. Products within
a tile would multiply it by zero for them, and 0 * NaN is NaN. Kernels select
instead, forward; for backward, and without a backward kernel, such a token
takes part with zeros, and the outputs that it reaches give no gradient but NaN
to their own query (as in `walks.hidden`).
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import op
from pallas_kernels.walks import hidden


def attend(implementation, params, operands):
  """Linear attention on canonical operands, forward and backward.

  Args:
    implementation: `contract.Implementation`; see `operands`.
    params: `operands.Params`.
    operands: `operands.Operands`.

  Returns:
    out `[B, n, H, Dv]` and the last state `[B, H, D, Dv]`.
  """
  if implementation.backward is None:
    out, last = implementation.forward(cleaned(operands), params)
    return poisoned(out, last, operands.q, *bad_results(operands))
  return _attend(implementation, params, operands)


def cleaned(operands):
  """Operands with zeros in tokens that are not finite."""
  q, k, v, *rest = operands
  asking, good = hidden.finite(q), hidden.finite(k, v)

  def cleaned():
    return (
      hidden.zeroed(q, asking),
      hidden.zeroed(k, good),
      hidden.zeroed(v, good),
    )

  fine = asking.all() & good.all()
  return type(operands)(*lax.cond(fine, lambda: (q, k, v), cleaned), *rest)


def bad_results(operands):
  """Outputs `[B, n, H]` and last states `[B, H]` that are not finite."""
  q, k, v, *_ = operands
  missing = hidden.of_queries(~hidden.finite(k, v), q.shape[2], axis=2)
  reached = lax.cummax(missing.astype(jnp.int32), axis=1) > 0
  return reached | ~hidden.finite(q), reached[:, -1]


@jax.custom_vjp
def poisoned(out, last, q, bad, bad_last):
  """NaN in bad results, and no gradient through them but NaN to queries."""
  del q

  def marked():
    rows = jnp.where(bad[..., None], jnp.nan, out)
    return rows, jnp.where(bad_last[..., None, None], jnp.nan, last)

  return lax.cond(bad.any(), marked, lambda: (out, last))


def _poisoned_fwd(out, last, q, bad, bad_last):
  return poisoned(out, last, q, bad, bad_last), (q, bad, bad_last)


def _poisoned_bwd(kept, cotangents):
  q, bad, bad_last = kept
  d_out, d_last, nan = _cotangents(bad, bad_last, *cotangents)
  d_q = jnp.where(nan[..., None], jnp.nan, jnp.zeros_like(q))
  return d_out, d_last, d_q, None, None


poisoned.defvjp(_poisoned_fwd, _poisoned_bwd)


def _cotangents(bad, bad_last, d_out, d_last):
  """Zeros in cotangents of what is bad, and which queries get NaN."""
  bad = bad | ~hidden.finite(d_out)
  nan = bad & jnp.any(d_out != 0, axis=-1)
  d_last = jnp.where(bad_last[..., None, None], 0, d_last)
  return hidden.zeroed(d_out, ~bad), d_last, nan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation, params, operands):
  return _forward(implementation, params, operands, keep=False)[:2]


def _forward(implementation, params, operands, keep):
  """Results of a kernel, and what its backward pass needs."""

  call = functools.partial(implementation.forward, params=params, keep=keep)
  return op.batchable(call)(operands)


def _fwd(implementation, params, operands):
  *results, kept = _forward(implementation, params, operands, keep=True)
  return tuple(results), (operands, kept)


def _bwd(implementation, params, residuals, cotangents):
  operands, kept = residuals
  d_out, d_last, nan = _cotangents(*bad_results(operands), *cotangents)
  operands = cleaned(operands)
  # States that a bad token has reached have no part in what is left.
  kept = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), kept)

  def run(operands, kept, d_out, d_last):
    return implementation.backward(
      operands, params=params, kept=kept, d_out=d_out, d_last=d_last
    )

  found = op.batchable(run)(operands, kept, d_out, d_last)
  return (found._replace(q=jnp.where(nan[..., None], jnp.nan, found.q)),)


_attend.defvjp(_fwd, _bwd)
