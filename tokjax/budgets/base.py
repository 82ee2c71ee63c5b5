"""What a budget is: how many tokens remain, at which layer.

Counts are static integers for every length, so that the shapes of a compiled
program follow from the configuration. Ragged batches look their lengths up in
a table: a padded example keeps what it would keep alone.
"""

import abc
import functools
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np

Counts = tuple[int | None, ...]
# A number for each of some blocks: indices or fractions of the depth.
ByBlock = tuple[tuple[int | float, int | float], ...]
# In a table: nothing is removed.
NOTHING = np.iinfo(np.int32).min


class BudgetError(ValueError):
  """A budget that cannot be carried out; the message names the fix."""


class Budget(abc.ABC):
  """How many tokens remain at a layer; subclasses are frozen dataclasses.

  Class attributes:
    of: which number `count` is given: that of the "initial" tokens, at the
      input of the model, or that of the tokens "arriving" at the layer.
    bound: the count is an upper bound: of fewer tokens all stay.
    layered: the count depends on the layer; False: one table serves all.
    shared: reductions share a keep ratio; False: none turns this one.
  """

  of: ClassVar[Literal["initial", "arriving"]] = "initial"
  bound: ClassVar[bool] = False
  layered: ClassVar[bool] = True
  shared: ClassVar[bool] = True

  @abc.abstractmethod
  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    """How many of `tokens` remain; None: nothing is removed there.

    Args:
      tokens: number of free tokens, see `of`.
      layer: index of the block.
      depth: number of blocks.
    """

  @abc.abstractmethod
  def with_keep(self, keep: float) -> "Budget":
    """The budget of this shape that ends with about `keep` * tokens."""

  def counts(self, tokens: int, depth: int) -> Counts:
    """`count` of every block, for a model with this budget alone."""
    left, found = tokens, []
    for layer in range(depth):
      given = left if self.of == "arriving" else tokens
      after = self.count(given, layer, depth)
      if self.bound and after is not None:
        after = None if after >= left else after
      left = left if after is None else after
      found.append(after)
    return tuple(found)


def check_keep(keep: float, name: str = "keep") -> None:
  """Raises unless `keep` is a fraction; `name` is the argument's."""
  number = isinstance(keep, int | float) and not isinstance(keep, bool)
  if not (number and 0 < keep <= 1):
    raise BudgetError(f"{name}={keep!r}: must lie in (0, 1]")


def check_count(count: int, name: str) -> None:
  """Raises unless `count` is a whole number of tokens."""
  number = isinstance(count, int) and not isinstance(count, bool)
  if not (number and count >= 0):
    raise BudgetError(f"{name}={count!r}: must be a non-negative integer")


def block(layer: int | float, depth: int, name: str = "layer") -> int:
  """The index of a block given as such or as a fraction of the depth.

  Raises:
    BudgetError: there is no such block.
  """
  index = int(layer * depth) if isinstance(layer, float) else layer
  if not 0 <= index < depth:
    raise BudgetError(
      f"{name}={layer}: must be a block in 0..{depth - 1} or a fraction of the"
      " depth below 1.0"
    )
  return index


def stages(depth: int) -> tuple[int, ...]:
  """Blocks at one, two and three quarters of the depth: 3, 6, 9 of 12."""
  return tuple(sorted({max(depth * i // 4, 1) for i in (1, 2, 3)}))


def pairs(entries: ByBlock | dict[int | float, int | float]) -> ByBlock:
  """Entries for blocks as pairs, which are hashable."""
  given = entries.items() if isinstance(entries, dict) else entries
  return tuple((at, value) for at, value in given)


@functools.cache
def exact(x: float) -> Fraction:
  """0.7 as seven tenths, so that floor(0.7 * 10) is 7 on every machine."""
  return Fraction(str(x))


def table(budget: Budget, tokens: int, layer: int, depth: int) -> np.ndarray:
  """Counts of every length up to `tokens`, int32 `[tokens + 1]`.

  `NOTHING` where a budget removes nothing.
  """
  at = (layer, depth) if budget.layered else (0, 1)
  return _table(budget, tokens, *at)


@functools.lru_cache(maxsize=1024)
def _table(budget: Budget, tokens: int, layer: int, depth: int) -> np.ndarray:
  kept = [budget.count(n, layer, depth) for n in range(tokens + 1)]
  return np.asarray([NOTHING if n is None else n for n in kept], np.int32)
