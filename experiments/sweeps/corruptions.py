"""Corruptions of images, under which robust models lose less.

Functions of images `[b, y, x, c]` and a key.
"""

import jax
import jax.numpy as jnp


def noise(x: jax.Array, key: jax.Array) -> jax.Array:
  """Normal noise of deviation 0.7 on every pixel."""
  return x + 0.7 * jax.random.normal(key, x.shape)


def occlude(x: jax.Array, key: jax.Array) -> jax.Array:
  """A square of a quarter of the image becomes background."""
  side = x.shape[1] // 2
  corner = jax.random.randint(key, (len(x), 2), 0, x.shape[1] - side + 1)
  at = jnp.arange(x.shape[1])
  inside = lambda c: (at >= c[:, None]) & (at < c[:, None] + side)
  hole = inside(corner[:, 0])[:, :, None] & inside(corner[:, 1])[:, None, :]
  return jnp.where(hole[..., None], x.min(), x)


def blur(x: jax.Array, key: jax.Array) -> jax.Array:
  """The mean over 3 x 3 pixels; outside the image is zero."""
  del key
  window = (1, 3, 3, 1)
  total = jax.lax.reduce_window(
    x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME"
  )
  return total / 9


CORRUPTIONS = {"noise": noise, "occlusion": occlude, "blur": blur}
