"""Products with matrices, in the form that a CPU is fast at."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tokjax import xla_options

# XLA for CPUs multiplies this many rows in bfloat16 ten times as fast as one,
# for which it has a scalar loop (AVX-512; JAX 0.11 and 0.12, and 0.10 with the
# option below: without it two rows are as slow as one).
ROWS = 2
# Has YNNPACK multiply where it can. Before its own products in bfloat16, XLA of
# JAX 0.10 writes the whole matrix anew, in float32: more work than a few rows
# are. From JAX 0.11 on its own products are twice as fast as with the option.
LIBRARY = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
NEEDED = jax.__version_info__ < (0, 11)


class Compiled:
  """`jax.jit` for a program with products of few rows in a dtype.

  Programs in bfloat16 for a CPU leave their products to a library where XLA's
  own are slow (which is a tenth slower than these where rows are many). XLA
  takes options of whole programs only: called within another one it is part of
  that, and compiled like it.
  """

  def __init__(self, run: Callable[..., Any], dtype: Any, **options: Any):
    jit = lambda **more: jax.jit(run, **options, **more)
    few = dtype == jnp.bfloat16 and NEEDED
    found = xla_options.known(LIBRARY) if few else {}
    self._plain: Any = jit()
    self._alone: Any = jit(compiler_options=found) if found else None

  def of(self, *args: Any) -> Any:
    """The jitted function for these arguments."""
    if self._alone is None:
      return self._plain
    leaves = jax.tree.leaves(args)
    within = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    return self._plain if within else self._alone

  def __call__(self, *args: Any) -> Any:
    return self.of(*args)(*args)

  def compiled(self) -> int:
    """How many programs were compiled."""
    both = (self._plain, self._alone)
    return sum(one._cache_size() for one in both if one is not None)


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
