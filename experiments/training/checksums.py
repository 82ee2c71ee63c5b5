"""Checksums of what a checkpoint holds.

They are computed from the values, not from files: the same on any mesh, on any
number of hosts, and of what was really read back.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from experiments.training import trees

# An odd factor for every place (Knuth's multiplicative hashing, times two).
# The sum changes with any single bit, and with the order of the elements.
FACTOR = (2 * 0x9E3779B1) & 0xFFFFFFFF
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def inspect(tree: Any) -> tuple[dict[str, int], list[str]]:
  """Checksums of the arrays of a pytree, and the names of diverged ones.

  Args:
    tree: of JAX arrays; with several hosts all of them must call this.

  Returns:
    A 32-bit checksum for each array by name, and the names of arrays that
    hold NaN or infinite numbers.
  """
  leaves = trees.named(tree)
  found = jax.device_get({name: _settled(x) for name, x in leaves.items()})
  sums = {name: int(checksum) for name, (checksum, _) in found.items()}
  return sums, [name for name, (_, finite) in found.items() if not finite]


def _settled(x: Any) -> tuple[jax.Array, jax.Array]:
  """`_inspect`, one after the other on CPU devices.

  Programs over several of them share few threads. With many under way, each
  waiting for its other devices, a run was seen to stand still for good.
  """
  found = _inspect(x)
  if any(device.platform == "cpu" for device in found[0].devices()):
    jax.block_until_ready(found)
  return found


def of_json(value: Any) -> str:
  """Checksum of a value as JSON; the order of keys does not matter."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _inspect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  # One program for each shape; sums over shards, no array is gathered.
  return _checksum(x), jnp.isfinite(x).all()


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])
  words = words.astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * jnp.uint32(size) + along
  weight = place * jnp.uint32(FACTOR) + jnp.uint32(1)
  return (words * weight).sum(dtype=jnp.uint32)
