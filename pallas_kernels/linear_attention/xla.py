"""Linear attention by tiles: products within a tile, a state between tiles.

Exponents of the decay are never negative powers, so no factor overflows. The
backward pass keeps one state per tile and recomputes the rest of the tile.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp


def attend(q, k, v, log_decay, state, scale, block, precision):
  """Causal linear attention with decay.

  Args:
    q, k: `[N, n, D]`, N = batch times heads.
    v: `[N, n, Dv]`.
    log_decay: `[N]` in the accumulation dtype.
    state: `[N, D, Dv]` in the accumulation dtype.
    scale: factor on the output.
    block: tile length in tokens.
    precision: of the products.

  Returns:
    Output `[N, n, Dv]` and last state `[N, D, Dv]`, in the state's dtype.
  """
  block = min(block, q.shape[1])
  one = functools.partial(
    _one_head, scale=scale, block=block, precision=precision
  )
  if jax.default_backend() == "cpu":
    # Plain 2-D products in a loop are several times faster than batched ones.
    return lax.map(lambda x: one(*x), (q, k, v, log_decay, state))
  return jax.vmap(one)(q, k, v, log_decay, state)


def _one_head(q, k, v, log_decay, state, *, scale, block, precision):
  """One head: a scan over tiles."""
  n, dtype = q.shape[0], state.dtype
  tiles = -(-n // block)
  cut = lambda x: jnp.pad(x, ((0, tiles * block - n), (0, 0))).reshape(
    tiles, block, x.shape[1]
  )
  # The last tile may hold fewer tokens; only those may decay the state.
  held = jnp.minimum(n - jnp.arange(tiles) * block, block)
  tile = functools.partial(
    _tile, log_decay=log_decay, scale=scale, precision=precision, dtype=dtype
  )
  state, out = lax.scan(
    jax.checkpoint(tile), state, (cut(q), cut(k), cut(v), held)
  )
  return out.reshape(tiles * block, -1)[:n], state


def _tile(state, inputs, *, log_decay, scale, precision, dtype):
  """One tile: its own causal products, and what the state contributes."""
  q, k, v, held = inputs
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  dot = functools.partial(jnp.dot, precision=precision)
  at = jnp.arange(q.shape[0])
  power = lambda steps: jnp.exp(log_decay * jnp.maximum(steps, 0).astype(dtype))
  lag = at[:, None] - at[None, :]
  within = dot(q, k.T) * jnp.where(lag >= 0, power(lag), 0)
  out = dot(within, v) + power(at + 1)[:, None] * dot(q, state)
  new = power(held) * state + dot((k * power(held - 1 - at)[:, None]).T, v)
  return new, scale * out
