"""Static attention patterns: hashable element masks that know their blocks.

A pattern is a frozen dataclass that is called as `pattern(h, q, k)`: `h` is
the query head (an int32 scalar), `q` and `k` are int32 positions of one rank
that broadcast against each other; the result is boolean. It uses operators
only, so the same object runs on NumPy, in jit and inside a Pallas kernel, and
it captures no arrays, so it is hashable and does not recompile.

`classify` says for whole blocks whether *some* and whether *every* pair is
visible, from the block's corner positions alone: no element is ever looked at.
It may err on the safe side (`some` too often, `every` too seldom), which costs
time but never changes the result, because such a block is masked elementwise.
"""

import dataclasses

import numpy as np
from jaxtyping import Int8


class Pattern:
  """Base of the patterns: set operators, and one head unless overridden."""

  # Number of heads the pattern tells apart; 1 means all heads are alike.
  heads = 1

  def __call__(self, h, q, k):
    raise NotImplementedError

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    """Returns `(some, every)` for inclusive position ranges of blocks."""
    raise NotImplementedError

  def for_head(self, h: int) -> "Pattern":
    """Returns the pattern of head `h` alone."""
    del h
    return self

  def __and__(self, other):
    return And(self, other)

  def __or__(self, other):
    return Or(self, other)

  def __invert__(self):
    return Not(self)


def _common_heads(a, b):
  if a.heads != b.heads and 1 not in (a.heads, b.heads):
    raise ValueError(
      f"patterns of {a.heads} and {b.heads} heads cannot be combined; the "
      "head counts must be equal or one of them 1"
    )
  return max(a.heads, b.heads)


@dataclasses.dataclass(frozen=True)
class And(Pattern):
  """Pairs that both patterns show."""

  a: Pattern
  b: Pattern

  @property
  def heads(self):
    return _common_heads(self.a, self.b)

  def __call__(self, h, q, k):
    return self.a(h, q, k) & self.b(h, q, k)

  def classify(self, *corners):
    some_a, every_a = self.a.classify(*corners)
    some_b, every_b = self.b.classify(*corners)
    return some_a & some_b, every_a & every_b

  def for_head(self, h: int) -> "Pattern":
    return And(self.a.for_head(h), self.b.for_head(h))


@dataclasses.dataclass(frozen=True)
class Or(Pattern):
  """Pairs that either pattern shows."""

  a: Pattern
  b: Pattern

  @property
  def heads(self):
    return _common_heads(self.a, self.b)

  def __call__(self, h, q, k):
    return self.a(h, q, k) | self.b(h, q, k)

  def classify(self, *corners):
    some_a, every_a = self.a.classify(*corners)
    some_b, every_b = self.b.classify(*corners)
    return some_a | some_b, every_a | every_b

  def for_head(self, h: int) -> "Pattern":
    return Or(self.a.for_head(h), self.b.for_head(h))


@dataclasses.dataclass(frozen=True)
class Not(Pattern):
  """Pairs that the pattern hides."""

  a: Pattern

  @property
  def heads(self):
    return self.a.heads

  def __call__(self, h, q, k):
    return ~self.a(h, q, k)

  def classify(self, *corners):
    some, every = self.a.classify(*corners)
    return ~every, ~some

  def for_head(self, h: int) -> "Pattern":
    return Not(self.a.for_head(h))


@dataclasses.dataclass(frozen=True)
class Full(Pattern):
  """Every pair."""

  def __call__(self, h, q, k):
    return (q == q) & (k == k)

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    yes = (q_lo <= q_hi) & (k_lo <= k_hi)
    return yes, yes


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
  """Keys up to the query's own position plus `offset`.

  With `offset = k_len - q_len` the last query sees the last key.
  """

  offset: int = 0

  def __call__(self, h, q, k):
    return k <= q + self.offset

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    return k_lo - q_hi <= self.offset, k_hi - q_lo <= self.offset


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
  """Sliding window: keys `q - left ... q + right`, both ends included."""

  left: int
  right: int = 0

  def __call__(self, h, q, k):
    return (k - q >= -self.left) & (k - q <= self.right)

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    low, high = k_lo - q_hi, k_hi - q_lo
    some = (high >= -self.left) & (low <= self.right)
    return some, (low >= -self.left) & (high <= self.right)


@dataclasses.dataclass(frozen=True)
class Dilated(Pattern):
  """Keys whose distance to the query is a multiple of `stride`."""

  stride: int

  def __call__(self, h, q, k):
    return (q - k) % self.stride == 0

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    low, high = k_lo - q_hi, k_hi - q_lo
    some = high // self.stride * self.stride >= low
    return some, some & ((low == high) | (self.stride == 1))


@dataclasses.dataclass(frozen=True)
class Sinks(Pattern):
  """The first `count` keys, for every query."""

  count: int

  def __call__(self, h, q, k):
    return (k < self.count) & (q == q)

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    there = q_lo <= q_hi
    return there & (k_lo < self.count), there & (k_hi < self.count)


@dataclasses.dataclass(frozen=True)
class Global(Pattern):
  """Tokens `start ... start + count - 1` see all and are seen by all."""

  count: int
  start: int = 0

  def __call__(self, h, q, k):
    end = self.start + self.count
    return ((q >= self.start) & (q < end)) | ((k >= self.start) & (k < end))

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    end = self.start + self.count
    q_some, k_some = (
      (hi >= self.start) & (lo < end) & (self.count > 0)
      for lo, hi in ((q_lo, q_hi), (k_lo, k_hi))
    )
    q_every, k_every = (
      (lo >= self.start) & (hi < end) for lo, hi in ((q_lo, q_hi), (k_lo, k_hi))
    )
    return q_some | k_some, q_every | k_every


@dataclasses.dataclass(frozen=True)
class Row(Pattern):
  """Pairs in one row of an image of `width` tokens, row by row."""

  width: int

  def __call__(self, h, q, k):
    return q // self.width == k // self.width

  def classify(self, q_lo, q_hi, k_lo, k_hi):
    q_lo, q_hi = q_lo // self.width, q_hi // self.width
    k_lo, k_hi = k_lo // self.width, k_hi // self.width
    every = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
    return (q_lo <= k_hi) & (k_lo <= q_hi), every


def column(width: int) -> Pattern:
  """Pairs in one column of an image of `width` tokens, row by row."""
  return Dilated(width)


def criss_cross(width: int) -> Pattern:
  """Row and column of the query's pixel (CCNet, arXiv 1811.11721)."""
  return Row(width) | column(width)


@dataclasses.dataclass(frozen=True)
class PerHead(Pattern):
  """Head `h` follows `patterns[h]`; equal patterns are evaluated once."""

  patterns: tuple

  def __post_init__(self):
    if any(p.heads != 1 for p in self.patterns) or not self.patterns:
      raise ValueError(
        "PerHead takes a non-empty tuple of one-head patterns, got "
        f"{self.patterns}"
      )

  @property
  def heads(self):
    return len(self.patterns)

  def __call__(self, h, q, k):
    shown = None
    for pattern in dict.fromkeys(self.patterns):
      mine = False
      for i, p in enumerate(self.patterns):
        if p == pattern:
          mine = (h == i) | mine
      part = pattern(h, q, k) & mine
      shown = part if shown is None else shown | part
    return shown

  def classify(self, *corners):
    raise ValueError("PerHead.classify needs a head; call for_head(h) first")

  def for_head(self, h: int) -> "Pattern":
    return self.patterns[h]


def block_kinds(
  pattern: Pattern, block_q: int, block_k: int, q_len: int, k_len: int
) -> Int8[np.ndarray, "heads i j"]:
  """Classifies every block of a pattern on the host.

  Returns:
    int8 `[heads, q blocks, k blocks]`: 0 nothing visible, 1 partly, 2 all.
  """
  q_lo = np.arange(0, q_len, block_q, dtype=np.int32)[:, None]
  k_lo = np.arange(0, k_len, block_k, dtype=np.int32)[None, :]
  q_hi = np.minimum(q_lo + block_q, q_len) - 1
  k_hi = np.minimum(k_lo + block_k, k_len) - 1
  grid = np.broadcast_shapes(q_lo.shape, k_lo.shape)
  kinds = []
  for h in range(pattern.heads):
    some, every = pattern.for_head(h).classify(q_lo, q_hi, k_lo, k_hi)
    kind = np.where(every, 2, np.where(some, 1, 0)).astype(np.int8)
    kinds.append(np.broadcast_to(kind, grid))
  return np.stack(kinds)
