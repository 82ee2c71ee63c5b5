"""Budgets for every block: so many go there, or so many have room."""

import dataclasses
from typing import ClassVar

from tokjax.budgets.base import (
  Budget,
  BudgetError,
  Counts,
  block,
  check_count,
  check_keep,
  exact,
)


class _Removing(Budget):
  """Removes a number of tokens a block, whatever arrives there."""

  of: ClassVar = "arriving"

  def removed(self, layer: int, depth: int) -> int:
    """How many go at a block."""
    raise NotImplementedError

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    r = self.removed(layer, depth)
    return tokens - r if r else None

  def with_keep(self, keep: float) -> "Even":
    return Even(keep)


@dataclasses.dataclass(frozen=True)
class Constant(_Removing):
  """Removes `r` tokens in every block from `first` on (ToMe's constant r).

  Attributes:
    r: tokens that a block removes.
    first: the first block that does.
  """

  r: int
  first: int = 0

  def __post_init__(self):
    check_count(self.r, "r")

  def removed(self, layer: int, depth: int) -> int:
    return self.r if layer >= block(self.first, depth, "first") else 0

  def with_keep(self, keep: float) -> "Even":
    return Even(keep, self.first)


@dataclasses.dataclass(frozen=True)
class Linear(_Removing):
  """Removes more early (slope -1: 2r to 0) or late (slope 1: 0 to 2r).

  ToMe's `parse_r`: floor(r (1 - slope)) in the first block, linearly to
  2r - that in the last, rounded down.

  Attributes:
    r: tokens that a block removes on average.
    slope: from -1 (early) to 1 (late).
  """

  r: int
  slope: float = -1.0

  def __post_init__(self):
    check_count(self.r, "r")
    if not -1 <= self.slope <= 1:
      raise BudgetError(f"slope={self.slope!r}: must lie in [-1, 1]")

  def removed(self, layer: int, depth: int) -> int:
    low = int(self.r * (1.0 - self.slope))
    high = 2 * self.r - low
    step = (high - low) / max(depth - 1, 1)
    return int(low + step * layer)


@dataclasses.dataclass(frozen=True)
class Removals(_Removing):
  """Removes `r[l]` tokens in block l; blocks beyond the list remove none."""

  r: tuple[int, ...]

  def __post_init__(self):
    object.__setattr__(self, "r", tuple(self.r))
    for i, r in enumerate(self.r):
      check_count(r, f"r[{i}]")

  def removed(self, layer: int, depth: int) -> int:
    return self.r[layer] if layer < len(self.r) else 0


@dataclasses.dataclass(frozen=True)
class Even(Budget):
  """As many in every block from `first` on (up to rounding), ends at `keep`.

  Attributes:
    keep: fraction of the tokens that remains at the end.
    first: the first block that removes tokens.
  """

  keep: float
  first: int = 0

  def __post_init__(self):
    check_keep(self.keep)

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    gone = tokens - max(1, round(tokens * exact(self.keep)))
    first = block(self.first, depth, "first")
    left = lambda done: tokens - gone * max(done - first, 0) // (depth - first)
    return None if left(layer) == left(layer + 1) else left(layer + 1)

  def with_keep(self, keep: float) -> "Even":
    return Even(keep, self.first)


@dataclasses.dataclass(frozen=True)
class Capped(Budget):
  """Room for the fraction `keep` of the tokens in every block from `layer` on.

  For methods that choose how many they keep (an upper bound, filled up with
  masked tokens), and for those that give all tokens back after each block.

  Attributes:
    keep: fraction of the tokens that there is room for.
    layer: the first block, or a fraction of the depth.
  """

  keep: float
  layer: int | float = 0

  def __post_init__(self):
    check_keep(self.keep)

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    if layer < block(self.layer, depth):
      return None
    return max(1, round(tokens * exact(self.keep)))

  def with_keep(self, keep: float) -> "Capped":
    return Capped(keep, self.layer)


@dataclasses.dataclass(frozen=True)
class Fixed(Budget):
  """The counts themselves, one entry a block, None for none."""

  after: Counts

  def __post_init__(self):
    object.__setattr__(self, "after", tuple(self.after))
    for i, after in enumerate(self.after):
      if after is not None:
        check_count(after, f"after[{i}]")

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    if len(self.after) != depth:
      raise BudgetError(
        f"after={self.after}: has {len(self.after)} entries, one for each of"
        f" the {depth} blocks is needed"
      )
    return self.after[layer]

  def with_keep(self, keep: float) -> "Even":
    return Even(keep)
