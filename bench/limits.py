"""What the machine can do, and how long a kernel must take at least."""

import dataclasses

import jax
import jax.numpy as jnp

from bench import clock

# FLOPs of a backward pass as a multiple of the forward's: five products of
# which two are the forward's.
BACKWARD = 2.5


@dataclasses.dataclass(frozen=True)
class Machine:
  """Measured on the spot.

  Attributes:
    device: what JAX calls it.
    matmul: FLOP/s of a large product in the benchmark's dtype.
    bandwidth: bytes/s of a large copy, read and written bytes together.
  """

  device: str
  matmul: float
  bandwidth: float


@dataclasses.dataclass(frozen=True)
class Size:
  """Of one attention: `[batch, length, heads, head_size]`."""

  batch: int
  length: int
  heads: int
  key_heads: int
  head_size: int
  itemsize: int

  def flops(self, density: float, direction: str) -> float:
    """Of the two products over the listed pairs; backward 2.5 times that."""
    pairs = self.batch * self.heads * self.length**2 * density
    return 4 * pairs * self.head_size * _times(direction, BACKWARD)

  def bytes(self, direction: str) -> float:
    """Queries, keys, values and results once, and in backward again."""
    rows = 2 * self.batch * self.length * (self.heads + self.key_heads)
    return rows * self.head_size * self.itemsize * _times(direction, 2)

  def limit(self, machine: Machine, density: float, direction: str) -> float:
    """Seconds that products or traffic take at least."""
    return max(
      self.flops(density, direction) / machine.matmul,
      self.bytes(direction) / machine.bandwidth,
    )


def _times(direction: str, factor: float) -> float:
  return factor if direction == "backward" else 1


def measure(dtype, rounds: int = 5) -> Machine:
  """Times a product of squares and a copy, the best of a few rounds."""
  best = lambda call: min(clock.in_turns([call], rounds, 0)[0])
  (multiply, flops), (move, moved) = product(dtype), copy()
  return Machine(
    jax.devices()[0].device_kind, flops / best(multiply), moved / best(move)
  )


def product(dtype, n: int | None = None) -> tuple[clock.Call, float]:
  """A product of squares, and its FLOPs.

  Of random numbers: multiplying equal ones takes less power, and a chip whose
  clock follows power is faster then.

  Args:
    dtype: of the factors.
    n: rows and columns; None: what fills a device of this kind.
  """
  n = n or (2048 if jax.default_backend() == "cpu" else 8192)
  make = lambda seed: jax.random.normal(jax.random.key(seed), (n, n), dtype)
  a, b, multiply = make(0), make(1), jax.jit(lambda a, b: a @ b)
  return clock.Call(lambda: multiply(a, b)), 2 * n**3


def copy(size: int | None = None) -> tuple[clock.Call, float]:
  """A copy of float32 numbers, and the bytes read and written."""
  size = size or 1 << (25 if jax.default_backend() == "cpu" else 29)
  x, add = jnp.ones((size,), jnp.float32), jax.jit(lambda x: x + 1)
  return clock.Call(lambda: add(x)), 8 * size
