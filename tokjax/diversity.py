"""Which tokens are unlike each other: greedy selections by a map `[n, n]`.

Each step picks one token, so that they run k steps over arrays of n. Shapes are
those of one example; lift them with `jax.vmap`. Ties go to the lower index.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.selection import Selection

# What a squared length is held above, so that roots and quotients are finite.
TINY = 1e-12


def max_min(
  distance: Float[Array, "n n"],
  k: int,
  *,
  first: Float[Array, "n"],
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Selection:
  """Farthest points: adds the token whose nearest picked one is farthest.

  Args:
    distance: between tokens.
    k: how many (static), at most n; they come in the order of picking.
    first: the token with the largest value is picked first.
    mask: False excludes a token.
    count: how many of the k this example may keep (traced); default all.
  """
  n = distance.shape[0]
  free = jnp.ones((n,), bool) if mask is None else mask

  def step(i, state):
    picked, free, nearest = state
    j = jnp.argmax(jnp.where(free, nearest, -jnp.inf))
    picked, real = picked.at[i].set(j.astype(jnp.int32)), free[j]
    free = free.at[j].set(False)
    # Behind the first pick `first` is replaced, not compared.
    seen = jnp.where(i == 0, distance[j], jnp.minimum(nearest, distance[j]))
    return picked, free, jnp.where(real, seen, nearest)

  start = (jnp.zeros((k,), jnp.int32), free, first.astype(distance.dtype))
  picked, _, _ = jax.lax.fori_loop(0, k, step, start)
  return _selection(picked, k, mask, count)


def determinantal(
  kernel: Float[Array, "n n"],
  k: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Selection:
  """Greedy maximum of the determinant of the kernel among the picked.

  The fast greedy algorithm of Chen et al. (2018): each step orthogonalises
  against one more picked token.

  Args:
    kernel: symmetric, positive semi-definite. Beyond its rank the tokens left
      are picked in their order.
    k, mask, count: see `max_min`.
  """
  n = kernel.shape[0]
  kernel = kernel.astype(jnp.float32)
  free = jnp.ones((n,), bool) if mask is None else mask

  def step(i, state):
    picked, free, rows, left = state
    j = jnp.argmax(jnp.where(free, left, -jnp.inf))
    picked = picked.at[i].set(j.astype(jnp.int32))
    root = jnp.sqrt(jnp.maximum(left[j], TINY))
    row = (kernel[j] - rows[:, j] @ rows) / root
    row = jnp.where(left[j] > TINY, row, 0.0)
    rows = rows.at[i].set(row)
    return picked, free.at[j].set(False), rows, left - jnp.square(row)

  start = (
    jnp.zeros((k,), jnp.int32), free, jnp.zeros((k, n), jnp.float32),
    jnp.diagonal(kernel),
  )  # fmt: skip
  picked, *_ = jax.lax.fori_loop(0, k, step, start)
  return _selection(picked, k, mask, count)


def _selection(picked, k: int, mask, count) -> Selection:
  if mask is None and count is None:
    return Selection(picked, None)
  real = jnp.int32(k) if mask is None else mask.sum(dtype=jnp.int32)
  most = real if count is None else jnp.minimum(real, count)
  return Selection(picked, jnp.arange(k) < most)
