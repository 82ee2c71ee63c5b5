"""Budgets that fall block by block to what they keep in the end."""

import dataclasses
import math

from tokjax.budgets.base import Budget, BudgetError, block, check_keep, exact
from tokjax.budgets.one_block import Once


@dataclasses.dataclass(frozen=True)
class Ramp(Budget):
  """Falls by equal steps, a block each, over a part of the depth (AIM).

  Attributes:
    keep: fraction of the initial tokens that remains in the end, one token at
      least.
    first: the first block that removes tokens, or a fraction of the depth.
    over: how many blocks do, as a fraction of the depth.
  """

  keep: float
  first: int | float = 0.5
  over: float = 2 / 7

  def __post_init__(self):
    # Nothing may remain but the one token that always does.
    if self.keep != 0:
      check_keep(self.keep)
    check_keep(self.over, "over")

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    first = block(self.first, depth, "first")
    steps = min(max(round(self.over * depth), 1), depth - first)

    def left(done: int) -> int:
      done = min(max(done, 0), steps)
      share = 1 - (1 - exact(self.keep)) * done / steps
      return max(math.floor(tokens * share), min(tokens, 1))

    before, after = left(layer - first), left(layer - first + 1)
    return None if before == after else after

  def with_keep(self, keep: float) -> "Ramp":
    check_keep(keep)
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class EveryOther(Budget):
  """Room in every second block, down to `keep` in the block before the last.

  FlowCut removes fewer tokens in a block the more evenly they are attended
  to: of n tokens (n - m) / sqrt(r) (1 - e^2), where m remain in the end, r
  blocks are left and e is the entropy of attention as a fraction of the
  largest. Room is what that leaves where e is `evenness` in every block. Block
  0 never removes any.

  Attributes:
    keep: see `Once`.
    evenness: e; 1.0: room for all tokens up to the last of these blocks.
  """

  keep: float | Budget
  evenness: float = 0.9

  def __post_init__(self):
    Once(self.keep)
    if not 0 <= self.evenness <= 1:
      raise BudgetError(f"evenness={self.evenness}: must lie in [0, 1]")

  def left(self, layer: int, depth: int) -> int:
    """Blocks from this one to the last that removes tokens."""
    return depth - 2 - layer

  def acts(self, layer: int, depth: int) -> bool:
    left = self.left(layer, depth)
    return layer > 0 and left >= 0 and left % 2 == 0

  def final(self, tokens: int, depth: int) -> int:
    """How many of `tokens` remain in the end."""
    return Once(self.keep).kept(tokens, 0, depth)

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    final, room = self.final(tokens, depth), tokens
    if final == tokens or not self.acts(layer, depth):
      return None
    for i in range(layer + 1):
      if self.acts(i, depth):
        room = self._after(room, final, self.left(i, depth))
    return room

  def _after(self, room: int, final: int, left: int) -> int:
    if left == 0:
      return final
    gone = (room - final) / math.sqrt(left) * (1 - self.evenness**2)
    return max(room - round(gone), final)

  def with_keep(self, keep: float) -> "EveryOther":
    kept = Once(self.keep).with_keep(keep).keep
    return dataclasses.replace(self, keep=kept)
