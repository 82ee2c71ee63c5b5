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
from pallas_kernels.walks import contract, hidden


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
  result = run(*_forward_operands(operands, weights, lse))
  if operands.bias is not None:
    result = _without_hidden(operands, *result)
  return result, (operands, weights, lse)


def _bwd(implementation, params, residuals, cotangents):
  operands, weights, lse = residuals
  run = op.batchable(functools.partial(implementation.backward, params))
  good = _good(operands, weights, lse)
  closed = jnp.where(good, _closed(operands, lse), jnp.inf)
  weights = jnp.where(good, weights, 0)
  d_q, d_k, d_bias, r = run(
    hidden.backward(operands), weights, closed, *cotangents
  )
  return (contract.Operands(d_q, d_k, None, d_bias, None), r, -weights * r)


def _good(operands, weights, lse):
  """Queries of which everything is finite; others give no gradients."""
  good = jnp.swapaxes(hidden.finite(operands.q), 1, 2)
  good = good & (jnp.isfinite(lse) | jnp.isneginf(lse))
  return good & jnp.isfinite(weights)


def _forward_operands(operands, weights, lse):
  """What a forward kernel gets; see `walks.hidden`.

  The logits of a bad query are NaN and nothing else of it: exp(logit - lse) of
  what a mask hides from it stays 0. One that sees nothing or counts with
  weight 0 has no part.
  """
  good = _good(operands, weights, lse)
  counts = ~jnp.isneginf(lse) & (weights != 0)
  rows = lambda x: jnp.swapaxes(x, 1, 2)[..., None]
  given = hidden.forward(operands)
  q = jnp.where(rows(good), given.q, jnp.where(rows(counts), jnp.nan, 0))
  lse = jnp.where(good, _closed(operands, lse), jnp.where(counts, 0, jnp.inf))
  return given._replace(q=q), jnp.where(good, weights, 1), lse


def _without_hidden(operands, columns, blocks):
  """Zeros for keys that a bias hides: NaN - inf would be NaN."""
  shown = ~jnp.isneginf(operands.bias)
  some = shown.reshape(*shown.shape[:2], blocks.shape[-1], -1).any(axis=-1)
  return jnp.where(shown, columns, 0), jnp.where(some[:, :, None], blocks, 0)


def _closed(operands, lse):
  """+inf instead of -inf, and in padded rows: no probability there."""
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  return lse.at[:, :, operands.layout.q_len :].set(jnp.inf)


masses.defvjp(_fwd, _bwd)
