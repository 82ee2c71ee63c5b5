"""Numbers in few bits: asymmetric codes, packed without waste.

Codes of B bits are stored as B bit planes, eight numbers a byte, so that any B
from 1 to 8 takes exactly B bits a number.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


class Coded(NamedTuple):
  """Numbers as codes: about `code * step + low`.

  Attributes:
    bits: packed codes, `[..., n / 8, B]`.
    low, step: of each group; they broadcast against groups.
  """

  bits: UInt8[Array, "*n"]
  low: Float[Array, "*g"]
  step: Float[Array, "*g"]


def check_bits(bits: int) -> None:
  """Raises unless codes of that many bits can be packed."""
  if not (isinstance(bits, int) and 1 <= bits <= 8):
    raise ValueError(f"bits={bits!r}: must be an integer in 1..8")


def pack(codes: UInt8[Array, "*a n"], bits: int) -> UInt8[Array, "*a m bits"]:
  """Bit planes of the last axis, whose length is a multiple of eight."""
  *lead, n = codes.shape
  if n % 8:
    raise ValueError(f"{n} codes cannot be packed by eights; pad them")
  codes = codes.reshape(*lead, n // 8, 8)
  # One number after the other: a sum over so short an axis is slow on a CPU.
  planes = [
    functools.reduce(
      jnp.bitwise_or, [(codes[..., j] >> i & 1) << j for j in range(8)]
    )
    for i in range(bits)
  ]
  return jnp.stack(planes, axis=-1)


def unpack(packed: UInt8[Array, "*a m bits"]) -> Int[Array, "*a n"]:
  """Undoes `pack`, into int32.

  Several bytes are read as one word, so that a CPU shifts as many numbers at
  once as a word has bits.
  """
  *lead, m, bits = packed.shape
  word = {0: jnp.uint32, 2: jnp.uint16}.get(m % 4, jnp.uint8)
  size = jnp.dtype(word).itemsize
  planes = jnp.swapaxes(packed, -1, -2).reshape(*lead, bits, m // size, size)
  planes = planes[..., 0] if size == 1 else planes
  words = jax.lax.bitcast_convert_type(planes, word)[..., None]
  place = jnp.arange(8 * size, dtype=word)
  place = place.reshape((1,) * (words.ndim - 2) + (-1,))
  ones = [(words[..., i, :, :] >> place & 1) << i for i in range(bits)]
  codes = functools.reduce(jnp.bitwise_or, ones).reshape(*lead, m * 8)
  return codes.astype(jnp.int32)


def limits(
  x: Float[Array, "*a"], bits: int, axis: int, valid: Array | None = None
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """Lowest value and step of codes along an axis, which is kept with size 1.

  Args:
    x: values.
    bits: of a code.
    axis: of a group.
    valid: broadcastable to x; others take no part.
  """
  if valid is None:
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
  else:
    low = jnp.where(valid, x, jnp.inf).min(axis, keepdims=True)
    high = jnp.where(valid, x, -jnp.inf).max(axis, keepdims=True)
    there = low <= high
    low, high = jnp.where(there, low, 0.0), jnp.where(there, high, 0.0)
  return low, (high - low) / (2**bits - 1)


def encode(
  x: Float[Array, "*a"],
  low: Float[Array, "*b"],
  step: Float[Array, "*b"],
  bits: int,
) -> UInt8[Array, "*a"]:
  """Nearest codes; 0 where a group is constant."""
  level = (x - low) / jnp.where(step > 0, step, 1.0)
  level = jnp.where(step > 0, level, 0.0)
  return jnp.clip(jnp.round(level), 0, 2**bits - 1).astype(jnp.uint8)


def decode(
  codes: Int[Array, "*a"], low: Float[Array, "*b"], step: Float[Array, "*b"]
) -> Float[Array, "*a"]:
  """code * step + low."""
  return codes.astype(step.dtype) * step + low


def ternary(
  x: Float[Array, "*a"], axis: int
) -> tuple[UInt8[Array, "*a"], Float[Array, "*b"]]:
  """Codes 0, 1, 2 of -1, 0, 1 times a scale, and that scale.

  The scale is the mean size of a group along `axis`, which is kept with size 1;
  what is not larger than half of it is 0.
  """
  scale = jnp.abs(x).mean(axis, keepdims=True)
  large = jnp.abs(x) > 0.5 * scale
  return jnp.where(large, jnp.where(x > 0, 2, 0), 1).astype(jnp.uint8), scale


def signs(
  x: Float[Array, "*a"], axis: int
) -> tuple[UInt8[Array, "*a"], Float[Array, "*b"]]:
  """Codes 0, 1 of -1, 1 times a scale, and that scale; 1 where x is 0.

  The scale is the mean size of a group along `axis`, kept with size 1.
  """
  scale = jnp.abs(x).mean(axis, keepdims=True)
  return (x >= 0).astype(jnp.uint8), scale


def pack_ternary(codes: UInt8[Array, "*a n"]) -> UInt8[Array, "*a m"]:
  """Five codes 0, 1, 2 a byte: 1.6 bits each."""
  *lead, n = codes.shape
  codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, -n % 5)], mode="edge")
  codes = codes.reshape(*lead, -1, 5)
  return functools.reduce(
    lambda total, i: total * 3 + codes[..., i],
    range(3, -1, -1),
    codes[..., 4],
  )


def unpack_ternary(
  packed: UInt8[Array, "*a m"], n: int
) -> UInt8[Array, "*a n"]:
  """Undoes `pack_ternary` of n codes."""
  three = jnp.uint8(3)
  digits, rest = [], packed
  for _ in range(5):
    digits.append(rest % three)
    rest = rest // three
  codes = jnp.stack(digits, axis=-1)
  return codes.reshape(*packed.shape[:-1], -1)[..., :n]
