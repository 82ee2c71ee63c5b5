"""The running softmax of GPU kernels that stream keys past resident queries."""

from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import contract, gpu_plan
from pallas_kernels.walks import gpu_tiles as tiles


class Running(NamedTuple):
  """Sums over the keys so far.

  Attributes:
    acc: `[64, Dv]`, weighted values.
    peak: maximum of each row, to base 2.
    mass: sum of each row's exponentials relative to it.
  """

  acc: Any
  peak: Any
  mass: Any


def start(plan):
  """The `Running` of no keys."""
  return Running(
    tiles.full((gpu_plan.ROWS, plan.dv), 0),
    tiles.full((gpu_plan.ROWS,), contract.MAX_INIT),
    tiles.full((gpu_plan.ROWS,), 0),
  )


def add(plan, running, logits, dtype):
  """Takes a tile's logits in.

  Args:
    plan: the `Plan`.
    running: `Running`.
    logits: `tiles.Logits`.
    dtype: of the probabilities.

  Returns:
    The `Running` whose acc still lacks the tile's values, and their factors.
  """
  peak = jnp.maximum(running.peak, logits.peak())
  shrink = jnp.exp2(running.peak - peak)
  p = logits.exp2(tiles.spread(peak, plan.tile, 0))
  acc = running.acc * tiles.spread(shrink, plan.dv, 0)
  mass = running.mass * shrink + jnp.sum(p, axis=1)
  # All of this is done before the product with the values begins.
  acc, mass, peak, p = lax.optimization_barrier(
    (acc, mass, peak, p.astype(dtype))
  )
  return Running(acc, peak, mass), p


def put(running, out, line):
  """Writes output and log-sum-exp where copies to global memory then read."""
  acc, peak, mass = running
  some = jnp.where(mass > 0, mass, 1.0)
  out[...] = (acc * tiles.spread(1 / some, acc.shape[1], 0)).astype(out.dtype)
  lse = (peak + jnp.log2(some)) * tiles.LN2
  line[...] = jnp.where(mass > 0, lse, -jnp.inf)
  plgpu.commit_smem()
