"""What the machine can do, and how long a kernel must take at least."""

import dataclasses
import time

import jax
import jax.numpy as jnp

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
  on_cpu = jax.default_backend() == "cpu"
  n = 2048 if on_cpu else 8192
  a = jnp.ones((n, n), dtype)
  product = best(jax.jit(lambda a, b: a @ b), (a, a), rounds)
  size = (1 << 25) if on_cpu else (1 << 29)
  x = jnp.ones((size,), jnp.float32)
  copy = best(jax.jit(lambda x: x + 1), (x,), rounds)
  return Machine(
    jax.devices()[0].device_kind, 2 * n**3 / product, 8 * size / copy
  )


def best(fn, args, rounds: int) -> float:
  """Seconds of the fastest of a few calls, after one to warm up."""
  jax.block_until_ready(fn(*args))
  return min(seconds(fn, args, 1) for _ in range(rounds))


def seconds(fn, args, calls: int) -> float:
  """Seconds of one of several calls in a row."""
  began = time.perf_counter()
  for _ in range(calls):
    result = fn(*args)
  jax.block_until_ready(result)
  return (time.perf_counter() - began) / calls
