"""Budgets of methods that remove tokens once, at one block."""

import dataclasses
import math

from tokjax.budgets.base import Budget, BudgetError, block, check_keep, exact


@dataclasses.dataclass(frozen=True)
class Once(Budget):
  """Reduces at one block, 0 by default.

  Attributes:
    keep: fraction of the initial tokens that remains, rounded to the nearest
      integer, at least one; or a budget, such as `Count(1024)`.
    layer: the block, or a fraction of the depth (0.5: half way).
  """

  keep: float | Budget
  layer: int | float = 0

  def __post_init__(self):
    if not isinstance(self.keep, Budget):
      check_keep(self.keep)
    elif not self.keep.bound:
      raise BudgetError(
        f"keep={self.keep}: must be a fraction, or a budget that names no"
        " blocks itself, such as Count(64) or Share(0.25)"
      )

  def kept(self, tokens: int, layer: int, depth: int) -> int:
    """How many of `tokens` remain."""
    if isinstance(self.keep, Budget):
      kept = self.keep.count(tokens, layer, depth)
      return tokens if kept is None else min(kept, tokens)
    return max(1, round(tokens * exact(self.keep)))

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    if layer != block(self.layer, depth):
      return None
    kept = self.kept(tokens, layer, depth)
    return None if kept == tokens else kept

  def with_keep(self, keep: float) -> "Once":
    if isinstance(self.keep, Budget):
      return dataclasses.replace(self, keep=self.keep.with_keep(keep))
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class AtEnd(Budget):
  """`Once`, at the last block, however many there are.

  Attributes:
    keep: see `Once`.
  """

  keep: float | Budget

  def __post_init__(self):
    Once(self.keep)

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    return Once(self.keep, depth - 1).count(tokens, layer, depth)

  def with_keep(self, keep: float) -> "AtEnd":
    return AtEnd(Once(self.keep).with_keep(keep).keep)


@dataclasses.dataclass(frozen=True)
class Square(Once):
  """`Once`, rounded to a square number: for poolers that need a grid."""

  def kept(self, tokens: int, layer: int, depth: int) -> int:
    side = max(1, round(math.sqrt(tokens * self.keep)))
    share = min(side * side / max(tokens, 1), 1.0)
    return Once(share, self.layer).kept(tokens, layer, depth)


@dataclasses.dataclass(frozen=True)
class Undecided(Budget):
  """Room for all tokens at one block: a rule decides how many go there.

  Shapes stay the same, so that no computation is saved; what goes is masked and
  does not count in caches. Keep ratios do not turn it.

  Attributes:
    layer: the block, or a fraction of the depth.
  """

  layer: int | float

  of = "arriving"
  shared = False

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    return tokens if layer == block(self.layer, depth) else None

  def with_keep(self, keep: float) -> "Undecided":
    return self


@dataclasses.dataclass(frozen=True)
class Encoded(Budget):
  """In a language model: as many as the encoder had left of each image.

  A vision-language model fills in the numbers; keep ratios turn the encoder.

  Attributes:
    left, whole: tokens of an image that remain, and that there are.
  """

  left: int = 1
  whole: int = 1

  shared = False

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    images, rest = divmod(tokens, self.whole)
    kept = images * self.left + min(rest, self.left)
    return None if layer or kept == tokens else kept

  def with_keep(self, keep: float) -> "Encoded":
    return self
