"""Combinations of element mask functions, hashable like their parts."""

import dataclasses
from typing import Any

from jax import numpy as jnp


@dataclasses.dataclass(frozen=True)
class Both:
  """Pairs that both untagged mask functions show."""

  a: Any
  b: Any

  def __call__(self, h, q, k):
    return self.a(h, q, k) & self.b(h, q, k)


def both(a, b):
  """Intersection of two untagged mask functions, None meaning all pairs."""
  if a is None or a == b:
    return b
  return a if b is None else Both(a, b)


@dataclasses.dataclass(frozen=True)
class Shifted:
  """An untagged mask function whose keys stand `offset` tokens further on.

  There were `k_len` keys before the shift; the places of others stay hidden.
  """

  a: Any
  offset: int
  k_len: int

  def __call__(self, h, q, k):
    k = k - self.offset
    there = (k < self.k_len) & (q == q)
    return there if self.a is None else there & self.a(h, q, k)


@dataclasses.dataclass(frozen=True)
class Tagged:
  """Union or intersection of two mask functions under a per-block tag.

  The two layouts may list a block differently: not at all, partially or fully.
  The tag says which: bit 0 = partial in the first (its function decides), bit
  1 = full in the first; bits 2 and 3 likewise for the second. Tags that the
  parts have themselves follow from bit 4 on.
  """

  a: Any
  b: Any
  op: str

  @property
  def bits(self):
    """Number of tag bits in use; at most 31."""
    return 4 + _bits(self.a) + _bits(self.b)

  def __call__(self, h, q, k, tag):
    a = _part(self.a, h, q, k, tag, 0, 4)
    b = _part(self.b, h, q, k, tag, 2, 4 + _bits(self.a))
    return a & b if self.op == "and" else a | b

  def tag(self, kind_a, kind_b, tag_a=None, tag_b=None):
    """Tags of blocks from their kinds (0, 1, 2) and tags in both layouts.

    Raises:
      ValueError: if unions are nested too deeply for the tag's 31 bits.
    """
    if self.bits > 31:
      raise ValueError(
        f"combined mask functions need {self.bits} tag bits, at most 31 are "
        "there; combine patterns (a | b) before building the layout"
      )
    tag = kind_a.astype(jnp.int32) | (kind_b.astype(jnp.int32) << 2)
    if tag_a is not None:
      tag = tag | (tag_a << 4)
    if tag_b is not None:
      tag = tag | (tag_b << (4 + _bits(self.a)))
    return tag


def _bits(fn):
  return fn.bits if isinstance(fn, Tagged) else 0


def _part(fn, h, q, k, tag, bit, start):
  """One side of a `Tagged` combination."""
  partial, full = ((tag >> bit) & 1) != 0, ((tag >> (bit + 1)) & 1) != 0
  if fn is None:
    shown = (q == q) & (k == k)
  elif isinstance(fn, Tagged):
    inner = (tag >> start) & ((1 << _bits(fn)) - 1)
    shown = fn(h, q, k, inner)
  else:
    shown = fn(h, q, k)
  return (shown & partial) | full
