"""A budget with two parts: the best tokens, and clusters of some others."""

import dataclasses
from typing import ClassVar

from tokjax.budgets.base import (
  Budget,
  BudgetError,
  ByBlock,
  block,
  check_count,
  check_keep,
  exact,
  pairs,
)


@dataclasses.dataclass(frozen=True)
class Recycled(Budget):
  """Keeps the best tokens and adds clusters of the best of the others.

  Of n tokens that arrive at a block, `best(n)` stay. Of the g that go, the
  best `pool(g)` = floor(0.3 g) + 1 form floor(pool / 10) + 1 clusters, one
  token each (SparseVLM). At least one token always goes, so that a block
  where fewer arrive than it may keep turns the worst into a cluster of its
  own: the number of tokens stays, their order changes. With `pooled=0` nothing
  is recycled: the others are dropped, all but the last token.

  Attributes:
    kept: blocks, as an index or a fraction of the depth, and how many of the
      arriving tokens are best there, as a number or a fraction; a dict or
      pairs. A fraction of 1.0 removes nothing. Of several entries for one
      block the last one counts.
    pooled: share of what goes that is clustered; 0: nothing is.
    each: tokens of a cluster, on average.
  """

  kept: ByBlock | dict[int | float, int | float]
  pooled: float = 0.3
  each: int = 10

  of: ClassVar = "arriving"

  def __post_init__(self):
    object.__setattr__(self, "kept", pairs(self.kept))
    for at, n in pairs(self.kept):
      if isinstance(n, float):
        check_keep(n, f"kept[{at}]")
      else:
        check_count(n, f"kept[{at}]")
    if self.pooled != 0:
      check_keep(self.pooled, "pooled")
    if self.each < 1:
      raise BudgetError(f"each={self.each}: must be 1 or more")

  def best(self, tokens: int, layer: int, depth: int) -> int | None:
    """How many of `tokens` stay as they are; None: nothing happens."""
    at_block = {block(at, depth, "kept"): n for at, n in pairs(self.kept)}
    found = at_block.get(layer)
    if found is None or (isinstance(found, float) and found == 1):
      return None
    if isinstance(found, float):
      found = round(tokens * exact(found))
    least = 0 if self.pooled else min(tokens, 1)
    return max(min(found, tokens - 1), least)

  def pool(self, gone: int) -> int:
    """How many of the tokens that go are clustered; none of none."""
    return min(int(gone * self.pooled) + 1, gone) if self.pooled else 0

  def clusters(self, gone: int) -> int:
    """How many clusters they form."""
    pool = self.pool(gone)
    return min(pool // self.each + 1, pool)

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    best = self.best(tokens, layer, depth)
    if best is None:
      return None
    return best + self.clusters(tokens - best)

  def with_keep(self, keep: float) -> "Recycled":
    """Equal shares at every block, clusters included: keep^(1/k) each."""
    check_keep(keep)
    share = keep ** (1 / len(self.kept))
    added = self.pooled / self.each
    best = min(max(round((share - added) / (1 - added), 6), 1e-6), 1.0)
    turned = tuple((at, best) for at, _ in pairs(self.kept))
    return dataclasses.replace(self, kept=turned)
