"""Linear attention by its definition: the full matrix of decayed products."""

import jax
from jax import numpy as jnp


def attend(q, k, v, log_decay, state, scale, block, precision):
  """See `xla.attend`; O(n^2) memory, plain autodiff. `block` is not used."""
  del block
  dtype = state.dtype
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  n = q.shape[1]
  at = jnp.arange(n)
  lag = at[:, None] - at[None, :]

  def one(q, k, v, log_decay, state):
    weight = jnp.where(
      lag >= 0, jnp.exp(log_decay * jnp.maximum(lag, 0).astype(dtype)), 0
    )
    out = jnp.dot(
      jnp.dot(q, k.T, precision=precision) * weight, v, precision=precision
    )
    since = jnp.exp(log_decay * (at + 1).astype(dtype))[:, None]
    out = out + since * jnp.dot(q, state, precision=precision)
    until = weight[-1][:, None]
    last = jnp.exp(log_decay * n) * state + jnp.dot(
      (k * until).T, v, precision=precision
    )
    return scale * out, last

  return jax.vmap(one)(q, k, v, log_decay, state)
