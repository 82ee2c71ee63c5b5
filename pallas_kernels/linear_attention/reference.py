"""Linear attention by its definition: the full matrix of decayed products."""

import jax
from jax import numpy as jnp

from pallas_kernels.linear_attention import operands as forms
from pallas_kernels.walks import contract


def forward(operands, params):
  """See `op.attend`; O(n^2) memory, plain autodiff. `block` is not used."""
  precision, dtype = params.precision, operands.state.dtype
  n = operands.q.shape[1]
  at = jnp.arange(n)
  lag = at[:, None] - at[None, :]

  def one(q, k, v, log_decay, state):
    q, k, v = (x.astype(dtype) for x in (q, k, v))
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
    return params.scale * out, last

  results = jax.vmap(one)(*forms.by_head(operands))
  return forms.from_heads(operands, *results)


# Plain autodiff, so that no backward is given.
IMPLEMENTATIONS = (contract.Implementation("reference", forward, None),)
