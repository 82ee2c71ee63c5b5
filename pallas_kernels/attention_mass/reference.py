"""The dense meaning of column and block mass, with plain autodiff."""

from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.walks import contract, hidden, numerics


def masses(params, operands, weights, lse=None):
  """Column sums `[B, H, K]` and block sums `[B, H, q blocks, k blocks]`.

  Args:
    params: `contract.Params`.
    operands: `contract.Operands`; `v` is not used. O(S^2) memory.
    weights: `[B, H, Q]`.
    lse: `[B, H, Q]`, or None to compute it here.
  """
  mask = reference.shown(operands)
  bad = reference.sees_bad(operands, mask)
  q, k, _, bias, layout = hidden.backward(operands)
  heads, groups = q.shape[2], k.shape[2]
  dtype = contract.acc_dtype(q)
  k = jnp.repeat(k.astype(dtype), heads // groups, axis=2)
  s = params.scale * jnp.einsum(
    "bihd,bjhd->bhij", q.astype(dtype), k, precision=params.precision
  )
  logits = numerics.capped(s, params.soft_cap)
  if bias is not None:
    logits = logits + bias[:, :, None, :]
  mask = jnp.broadcast_to(mask, logits.shape)
  if lse is None:
    lse = reference.log_sum_exp(jnp.where(mask, logits, -jnp.inf))
  # Bad queries, and those that an lse of NaN says to be, give NaN to what they
  # see, unless they are left out.
  bad = (bad | ~(jnp.isfinite(lse) | jnp.isneginf(lse))) & (weights != 0)
  bad = bad | ~jnp.isfinite(weights)
  weights = jnp.where(bad, 0, weights)
  mask = mask & ~jnp.isneginf(lse)[..., None]
  exponent = jnp.where(
    mask, logits - jnp.where(jnp.isfinite(lse), lse, 0)[..., None], -jnp.inf
  )
  p = jnp.where(mask, jnp.exp(jnp.where(mask, exponent, 0)), 0)
  p = jnp.where(bad[..., None] & mask, jnp.nan, p * weights[..., None])
  blocks = p.reshape(
    p.shape[:2]
    + (layout.q_blocks, layout.block_q, layout.k_blocks, layout.block_k)
  )
  return jnp.sum(p, axis=2), jnp.sum(blocks, axis=(3, 5))


# Plain autodiff, so that no backward is given.
IMPLEMENTATIONS = (contract.Implementation("reference", masses, None),)
