"""Linear attention by tiles: products within a tile, a state between tiles.

Exponents of the decay are never negative powers, so no factor overflows. The
backward pass, which autodiff makes, keeps one state per tile and recomputes
the rest of the tile.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import aot
from pallas_kernels.linear_attention import operands as forms
from pallas_kernels.walks import contract


def forward(operands, params):
  """See `op.attend`; results are in the accumulation dtype."""
  one = functools.partial(
    _one_head,
    scale=params.scale,
    block=min(params.block, operands.q.shape[1]),
    precision=params.precision,
  )
  arrays = forms.by_head(operands)
  if aot.platform() == "cpu":
    # Plain 2-D products in a loop are several times faster than batched ones.
    results = lax.map(lambda x: one(*x), arrays)
  else:
    results = jax.vmap(one)(*arrays)
  return forms.from_heads(operands, *results)


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


IMPLEMENTATIONS = (
  contract.Implementation(
    "xla", forward, None, platforms=("cpu", "gpu", "tpu")
  ),
)
