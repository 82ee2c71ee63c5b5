"""Custom VJP and vmap of the mass sums on canonical operands.

With `g[i, j] = d_columns[j] + d_blocks[block of i, block of j]`:

    r[i] = sum_j p[i, j] * g[i, j]
    d_weights[i] = r[i]       d_lse[i] = -weights[i] * r[i]
    d_logit[i, j] = p[i, j] * weights[i] * g[i, j]

and from there as in attention. `lse` is an input with its own gradient, so the
sums may be differentiated through whichever pass computed it.
"""

import functools

import jax
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import op
from pallas_kernels.walks import contract


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def masses(implementation, params, operands, weights, lse):
  """Column sums `[B, H, K]` and block sums `[B, H, q blocks, k blocks]`.

  Args:
    implementation: `contract.Implementation` with the functions of `xla`.
    params: `contract.Params`.
    operands: `contract.Operands`; `v` is None.
    weights, lse: `[B, H, Q]` in the accumulation dtype.
  """
  return _fwd(implementation, params, operands, weights, lse)[0]


def _fwd(implementation, params, operands, weights, lse):
  if implementation.needs_transpose:
    operands = operands._replace(layout=operands.layout.with_transpose())
  run = op.batchable(functools.partial(implementation.forward, params))
  # A bad query has logits of NaN and no other NaN: hidden keys get exp(-inf).
  good, _ = _good(operands, weights, lse)
  given = hidden.forward(operands)
  q = jnp.where(jnp.swapaxes(good, 1, 2)[..., None], given.q, jnp.nan)
  closed = jnp.where(good, _closed(operands, lse), 0)
  result = run(given._replace(q=q), jnp.where(good, weights, 1), closed)
  return result, (operands, weights, lse)


def _bwd(implementation, params, residuals, cotangents):
  operands, weights, lse = residuals
  run = op.batchable(functools.partial(implementation.backward, params))
  good, _ = _good(operands, weights, lse)
  closed = jnp.where(good, _closed(operands, lse), jnp.inf)
  weights = jnp.where(good, weights, 0)
  d_q, d_k, d_bias, r = run(
    hidden.backward(operands), weights, closed, *cotangents
  )
  return (contract.Operands(d_q, d_k, None, d_bias, None), r, -weights * r)


def _good(operands, weights, lse):
  """Queries of which everything is finite, and which see some key.

  Both bool `[B, H, Q]`. Bad ones give no gradients (see `walks.hidden`).
  """
  some = ~jnp.isneginf(lse)
  good = jnp.swapaxes(hidden.finite(operands.q), 1, 2)
  good = good & (jnp.isfinite(lse) | ~some) & jnp.isfinite(weights)
  return good, some


def _closed(operands, lse):
  """+inf instead of -inf, and in padded rows: no probability there."""
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  return lse.at[:, :, operands.layout.q_len :].set(jnp.inf)


masses.defvjp(_fwd, _bwd)
