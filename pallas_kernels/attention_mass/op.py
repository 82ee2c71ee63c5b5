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
  given = operands, *_forward_rows(operands, weights, lse)
  if not implementation.selects:
    given = _without_nan(*given)
  result = run(*given)
  if operands.bias is not None:
    result = _without_hidden(operands, *result)
  return result, (operands, weights, lse)


def _bwd(implementation, params, residuals, cotangents):
  operands, weights, lse = residuals
  run = op.batchable(functools.partial(implementation.backward, params))
  good = _good(operands, weights, lse)
  closed = jnp.where(good, _closed(operands, lse), jnp.inf)
  weights = jnp.where(good, weights, 0)
  given = operands if implementation.selects else hidden.backward(operands)
  d_q, d_k, d_bias, r = run(given, weights, closed, *cotangents)
  return (contract.Operands(d_q, d_k, None, d_bias, None), r, -weights * r)


def _good(operands, weights, lse):
  """Queries of which everything is finite; others give no gradients."""
  good = jnp.swapaxes(hidden.finite(operands.q), 1, 2)
  good = good & (jnp.isfinite(lse) | jnp.isneginf(lse))
  return good & jnp.isfinite(weights)


def _forward_rows(operands, weights, lse):
  """Weights and lse of the rows: NaN as lse of a bad query.

  One that sees nothing or counts with weight 0 has no part: +inf.
  """
  good = _good(operands, weights, lse)
  counts = ~jnp.isneginf(lse) & (weights != 0)
  bad = jnp.where(counts, jnp.nan, jnp.inf)
  lse = jnp.where(good, _closed(operands, lse), bad)
  return jnp.where(good, weights, 1), lse


def _without_nan(operands, weights, lse):
  """For kernels that do not select: queries of NaN instead of lse of NaN.

  Their logits are NaN and nothing else of them: exp(logit - lse) of what a mask
  hides stays 0.
  """
  rows = lambda x: jnp.swapaxes(x, 1, 2)[..., None]
  given, bad = hidden.forward(operands), jnp.isnan(lse)
  q = jnp.where(rows(bad), jnp.nan, hidden.plain(given.q))
  return given._replace(q=q), weights, jnp.where(bad, 0, lse)


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
