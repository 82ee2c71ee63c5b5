"""Integers of 32 bits, also with `jax_enable_x64`.

With it Python integers and loop counters become int64. JAX refuses to combine
those with the int32 numbers of a layout's lists, and kernels have none.
"""

import functools

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp


def read(x, start, shape):
  """`lax.dynamic_slice` from `start`, a tuple of integers or int scalars."""
  return lax.dynamic_slice(x, _cast(start), shape)


def write(x, values, start):
  """`lax.dynamic_update_slice` at `start`, a tuple as in `read`."""
  return lax.dynamic_update_slice(x, values, _cast(start))


def _cast(start):
  as_int32 = lambda n: (
    np.int32(n) if isinstance(n, int) else jnp.asarray(n, jnp.int32)
  )
  return tuple(map(as_int32, start))


def traced(fn):
  """`fn`, which builds a kernel of operands of at most 32 bits, without x64."""

  @functools.wraps(fn)
  def call(*args, **kwargs):
    with jax.enable_x64(False):
      return fn(*args, **kwargs)

  return call
