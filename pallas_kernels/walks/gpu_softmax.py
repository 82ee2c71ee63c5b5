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


class Weighed(NamedTuple):
  """What a tile of logits makes of the sums.

  Attributes:
    peak, mass: as in `Running`.
    shrink: what the weighted values so far are to be multiplied by, `[64]`.
    p: the tile's probabilities, relative to peak, float32.
  """

  peak: Any
  mass: Any
  shrink: Any
  p: Any


def weigh(plan, peak, mass, logits):
  """Takes a tile's logits in, and leaves the values to be added.

  Args:
    plan: the `Plan`.
    peak, mass: of `Running`.
    logits: `tiles.Logits`.

  Returns:
    `Weighed`.
  """
  new = jnp.maximum(peak, logits.peak())
  shrink = jnp.exp2(peak - new)
  p = logits.exp2(tiles.spread(new, plan.tile, 0))
  mass = mass * shrink + jnp.sum(p, axis=1)
  return Weighed(new, mass, shrink, p)


def add(plan, running, logits, dtype):
  """As `weigh`, but all at once, with p in a dtype of its own.

  Returns:
    The `Running` whose acc still lacks the tile's values, and their factors.
  """
  found = weigh(plan, running.peak, running.mass, logits)
  acc = shrunk(plan, running.acc, found.shrink)
  # All of this is done before the product with the values begins.
  acc, mass, peak, p = lax.optimization_barrier(
    (acc, found.mass, found.peak, found.p.astype(dtype))
  )
  return Running(acc, peak, mass), p


def shrunk(plan, acc, shrink):
  """Weighted values relative to a new maximum."""
  return acc * tiles.spread(shrink, plan.dv, 0)


def put(running, out, line):
  """Writes output and log-sum-exp where copies to global memory then read."""
  acc, peak, mass = running
  some = jnp.where(mass > 0, mass, 1.0)
  out[...] = (acc * tiles.spread(1 / some, acc.shape[1], 0)).astype(out.dtype)
  lse = (peak + jnp.log2(some)) * tiles.LN2
  line[...] = jnp.where(mass > 0, lse, -jnp.inf)
  plgpu.commit_smem()
