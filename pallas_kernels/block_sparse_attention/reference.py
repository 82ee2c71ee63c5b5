"""The obvious dense attention: the meaning of the operation, not its speed."""

import jax
from jax import numpy as jnp

from pallas_kernels.walks import contract, hidden, numerics


def attention(operands, params, sinks=None):
  """Block-sparse attention by a dense masked softmax; plain autodiff.

  Args:
    operands: `contract.Operands`; O(S^2) memory.
    params: `contract.Params`.
    sinks: `[H]` logits or None.

  Returns:
    out `[B, Q, H, Dv]`, lse `[B, H, Q]`.
  """
  mask = shown(operands)
  bad = sees_bad(operands, mask)
  q, k, v, bias, _ = hidden.backward(operands)
  heads, groups = q.shape[2], k.shape[2]
  dtype = contract.acc_dtype(q)
  spread = lambda x: jnp.repeat(x.astype(dtype), heads // groups, axis=2)
  s = params.scale * jnp.einsum(
    "bihd,bjhd->bhij", q.astype(dtype), spread(k), precision=params.precision
  )
  logits = numerics.capped(s, params.soft_cap)
  if bias is not None:
    logits = logits + bias[:, :, None, :]
  out_logits = jnp.where(mask, logits, -jnp.inf)
  if sinks is not None:
    column = jnp.expand_dims(sinks.astype(dtype), (0, 2, 3))
    column = jnp.broadcast_to(column, logits.shape[:-1] + (1,))
    out_logits = jnp.concatenate([out_logits, column], axis=-1)
  lse = log_sum_exp(out_logits)
  shift = jnp.where(jnp.isneginf(lse), 0, lse)[..., None]
  p = jnp.where(mask, jnp.exp(jnp.where(mask, logits - shift, 0)), 0)
  out = jnp.einsum("bhij,bjhd->bihd", p, spread(v), precision=params.precision)
  return hidden.poisoned(out.astype(q.dtype), lse, operands.q, bad)


def log_sum_exp(logits):
  """Log-sum-exp over the last axis with safe gradients in empty rows."""
  peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  shown = logits > -jnp.inf
  peak = jnp.where(jnp.isneginf(peak), 0, peak)
  total = jnp.sum(
    jnp.where(shown, jnp.exp(jnp.where(shown, logits, peak) - peak), 0), -1
  )
  empty = total == 0
  return jnp.where(
    empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + peak[..., 0]
  )


def visible(layout, heads, q_size, k_size):
  """Element mask bool `[1 or B, H, q_size, k_size]` for all query heads."""
  mask = layout.expand_heads(heads).to_dense()
  pad = ((0, 0), (0, 0), (0, q_size - layout.q_len), (0, k_size - layout.k_len))
  return jnp.pad(mask[..., : layout.q_len, : layout.k_len], pad)


def shown(operands):
  """`visible`, without what a bias hides: bool `[B, H, Q, K]`."""
  q, k, _, bias, layout = operands
  mask = visible(layout, q.shape[2], q.shape[1], k.shape[1])
  if bias is not None:
    mask = mask & ~jnp.isneginf(bias)[:, :, None, :]
  return mask


def sees_bad(operands, mask):
  """Whether a query sees what is not finite, or is not: bool `[B, H, Q]`.

  Args:
    operands: `contract.Operands`; v may be None.
    mask: of `shown`.
  """
  q, k, v, bias, _ = operands
  turned = lambda good: jnp.swapaxes(good, 1, 2)
  good = hidden.of_queries(turned(hidden.finite(k, v)), q.shape[2])
  if bias is not None:
    good = good & jnp.isfinite(bias)
  good = good[:, :, None, :] & turned(hidden.finite(q))[..., None]
  return jnp.any(mask & ~good, axis=-1)


def forward(operands, params):
  """See `contract`."""
  return attention(operands, params)


def backward(operands, params, lse, delta, d_out):
  """See `contract`; recomputes the dense probabilities from `lse`."""
  q, k, v, bias, layout = operands
  heads, groups = q.shape[2], k.shape[2]
  dtype = contract.acc_dtype(q)
  spread = lambda x: jnp.repeat(x.astype(dtype), heads // groups, axis=2)
  q_, k_, v_, d_out = q.astype(dtype), spread(k), spread(v), d_out.astype(dtype)
  s = params.scale * jnp.einsum("bihd,bjhd->bhij", q_, k_)
  logits = capped = numerics.capped(s, params.soft_cap)
  if bias is not None:
    logits = logits + bias[:, :, None, :]
  mask = visible(layout, heads, q.shape[1], k.shape[1])
  p = jnp.exp(jnp.where(mask, logits, -jnp.inf) - lse[..., None])
  d_logits = p * (jnp.einsum("bihd,bjhd->bhij", d_out, v_) - delta[..., None])
  d_s = d_logits * params.scale
  if params.soft_cap is not None:
    d_s = d_s * numerics.cap_slope(capped, params.soft_cap)
  group = lambda x: x.reshape(x.shape[:2] + (groups, heads // groups, -1)).sum(
    3
  )
  d_q = jnp.einsum("bhij,bjhd->bihd", d_s, k_).astype(q.dtype)
  d_k = group(jnp.einsum("bhij,bihd->bjhd", d_s, q_)).astype(k.dtype)
  d_v = group(jnp.einsum("bhij,bihd->bjhd", p, d_out)).astype(v.dtype)
  return d_q, d_k, d_v, None if bias is None else jnp.sum(d_logits, axis=2)


IMPLEMENTATIONS = (contract.Implementation("reference", forward, backward),)
