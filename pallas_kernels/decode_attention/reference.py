"""Decode attention by a dense mask over the whole cache; plain autodiff."""

import jax
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.decode_attention import operands as forms
from pallas_kernels.walks import contract, hidden, numerics


def attend(operands, options):
  """Returns output `[B, t, H, Dv]` and log-sum-exp `[B, H, t]`."""
  mask = visible(operands, options)
  q, k, v, _, bias, *_ = operands
  good = hidden.of_queries(forms.finite_entries(operands, options), q.shape[2])
  if bias is not None:
    mask = mask & ~jnp.isneginf(bias)[:, :, None, :]
    good = good & jnp.isfinite(bias)
    bias = jnp.where(jnp.isfinite(bias) | jnp.isneginf(bias), bias, 0)
  good = good[:, :, None] & jnp.swapaxes(hidden.finite(q), 1, 2)[..., None]
  bad = jnp.any(mask & ~good, axis=-1)
  q, k, v = (hidden.zeroed(x, hidden.finite(x)) for x in (q, k, v))
  k, v = (forms.heads_last(x, options) for x in (k, v))
  dtype = contract.acc_dtype(q)
  times = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x.astype(dtype), times, axis=2) for x in (k, v))
  s = options.scale * jnp.einsum("bthd,bnhd->bhtn", q.astype(dtype), k)
  logits = numerics.capped(s, options.soft_cap)
  if bias is not None:
    logits = logits + bias[:, :, None, :]
  lse = reference.log_sum_exp(jnp.where(mask, logits, -jnp.inf))
  safe = jnp.where(jnp.isneginf(lse), 0, lse)[..., None]
  p = jnp.where(mask, jnp.exp(jnp.where(mask, logits - safe, 0)), 0)
  out = jnp.einsum("bhtn,bnhd->bthd", p, v)
  return hidden.poisoned(out, lse, operands.q, bad)


def visible(operands, options):
  """Which entries each query sees, bool `[B, H, t, n]`."""
  n, groups = (f(operands, options) for f in (forms.length, forms.groups))
  at = jnp.arange(n, dtype=jnp.int32)
  end = forms.last_visible(operands, options)
  mask = (at[None, None, :] < end[:, :, None])[:, None]
  listed = operands.tokens if operands.blocks is None else operands.blocks
  if listed is not None:
    size = options.block_size if operands.tokens is None else 1
    order = jnp.arange(listed.shape[-1])[None, None]
    valid = order < operands.counts[..., None]

    def one(listed, valid):
      shown = jnp.zeros((-(-n // size),), bool).at[listed].max(valid)
      return jnp.repeat(shown, size)[:n]

    shown = jax.vmap(jax.vmap(one))(listed, valid)
    times = operands.q.shape[2] // groups
    mask = mask & jnp.repeat(shown, times, axis=1)[:, :, None]
  return jnp.broadcast_to(
    mask, mask.shape[:1] + (operands.q.shape[2],) + mask.shape[2:]
  )


# Plain autodiff.
IMPLEMENTATIONS = (contract.Implementation("reference", attend, None),)
