"""Products of few rows with a matrix, in the form that a CPU is fast at."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# XLA for CPUs multiplies this many rows in bfloat16 ten times as fast as one,
# for which it has a scalar loop (JAX 0.10, processor without such products).
ROWS = 4


def dot_general(
  x: Float[Array, "*b d"],
  w: Float[Array, "..."],
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> Float[Array, "*b f"]:
  """`lax.dot_general` for `nn.Dense`; few rows in bfloat16 are padded on a CPU.

  Args:
    x: rows; the last axis is contracted, and no axis is a batch of matrices.
    w: the matrix, `[d, f]` or `[f, d]`.
    dimension_numbers, precision, preferred_element_type: as there.
  """
  product = lambda x: lax.dot_general(
    x, w, dimension_numbers, precision, preferred_element_type
  )
  rows = x.size // x.shape[-1]
  slow = x.dtype == jnp.bfloat16 and 0 < rows < ROWS
  if not slow or jax.default_backend() != "cpu":
    return product(x)
  ((last,), (own,)), _ = dimension_numbers
  flat = x.reshape(rows, x.shape[-1])
  padded = jnp.pad(flat, ((0, ROWS - rows), (0, 0)))
  out = lax.dot_general(
    padded, w, (((1,), (own,)), ((), ())), precision, preferred_element_type
  )
  return out[:rows].reshape(*x.shape[:last], -1)
