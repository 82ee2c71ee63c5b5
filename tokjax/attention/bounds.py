"""Bounds on products with the keys of a page, from the keys' extremes.

Quest (arXiv 2406.10774), checked against its evaluation/quest_attention.py:
each feature contributes the larger of its products with the page's smallest
and largest key. Cache reads ask for single queries, estimators of blocks for
all of them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def extremes(
  k: Float[Array, "*b p n d"], there: Bool[Array, "*#b p n"]
) -> tuple[Float[Array, "*b p d"], Float[Array, "*b p d"]]:
  """Smallest and largest features of the keys of each page that are there.

  An empty page has infinity and minus infinity.
  """
  there = there[..., None]
  low = jnp.where(there, k, jnp.inf).min(axis=-2)
  return low, jnp.where(there, k, -jnp.inf).max(axis=-2)


def largest_products(
  q: Float[Array, "r d"], low: Float[Array, "p d"], high: Float[Array, "p d"]
) -> Float[Array, "r p"]:
  """No key of a page has a larger product with the query; -inf: it is empty."""
  there = jnp.isfinite(low[:, 0])
  low, high = (jnp.where(there[:, None], x, 0.0) for x in (low, high))
  best = jnp.maximum(q, 0.0) @ high.T + jnp.minimum(q, 0.0) @ low.T
  return jnp.where(there[None, :], best, -jnp.inf)
