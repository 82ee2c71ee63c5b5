"""Budgets that depend on the number of tokens: caches, prompts, windows."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tokjax.budgets.base import (
  Budget,
  BudgetError,
  check_count,
  check_keep,
  exact,
  table,
)
from tokjax.layer import Layer


@dataclasses.dataclass(frozen=True)
class Count(Budget):
  """At most so many tokens, however many there are."""

  tokens: int

  bound: ClassVar = True
  layered: ClassVar = False

  def __post_init__(self):
    check_count(self.tokens, "tokens")

  def count(self, tokens: int, layer: int, depth: int) -> int:
    return self.tokens

  def with_keep(self, keep: float) -> Budget:
    return Share(keep)


@dataclasses.dataclass(frozen=True)
class Always(Count):
  """So many tokens however the rest of a budget is turned: sinks."""

  def with_keep(self, keep: float) -> "Always":
    return self


@dataclasses.dataclass(frozen=True)
class Share(Budget):
  """A fraction of the tokens, rounded, and at least so many."""

  keep: float
  rounding: Literal["floor", "nearest"] = "floor"
  least: int = 1

  bound: ClassVar = True
  layered: ClassVar = False

  def __post_init__(self):
    check_keep(self.keep)
    if self.rounding not in ("floor", "nearest"):
      raise ValueError(
        f"rounding={self.rounding!r}: must be 'floor' or 'nearest'"
      )

  def count(self, tokens: int, layer: int, depth: int) -> int:
    share = exact(self.keep)
    kept = tokens * share.numerator // share.denominator
    if self.rounding == "nearest":
      kept = round(tokens * share)
    return max(kept, self.least)

  def with_keep(self, keep: float) -> "Share":
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class Multiple(Budget):
  """A fraction of the tokens, rounded down to a multiple, and some more.

  DART: each of 8 pivots adds as many tokens as the others, and 4 pivots are
  visual tokens themselves.

  Attributes:
    keep: fraction of the tokens that the multiple is at most.
    each: the count is so many times an integer,
    more: plus so many.
  """

  keep: float
  each: int = 8
  more: int = 4

  bound: ClassVar = True
  layered: ClassVar = False

  def __post_init__(self):
    check_keep(self.keep)
    check_count(self.more, "more")
    if self.each < 1:
      raise BudgetError(f"each={self.each}: must be 1 or more")

  def count(self, tokens: int, layer: int, depth: int) -> int:
    share = math.floor(tokens * exact(self.keep) / self.each)
    return max(share * self.each + self.more, 1)

  def with_keep(self, keep: float) -> "Multiple":
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class Beyond(Budget):
  """A budget of the tokens beyond so many, which it does not count.

  For a reduction that protects tokens at the ends, see
  `tokjax.reduce.free.Free`.

  Attributes:
    budget: of the other tokens.
    apart: how many are not counted.
  """

  budget: Budget
  apart: int

  bound: ClassVar = True

  def __post_init__(self):
    check_count(self.apart, "apart")

  @property
  def layered(self) -> bool:
    return self.budget.layered

  def count(self, tokens: int, layer: int, depth: int) -> int:
    if tokens <= self.apart:
      return tokens
    return bounded(self.budget, tokens - self.apart, layer, depth)

  def with_keep(self, keep: float) -> "Beyond":
    return Beyond(self.budget.with_keep(keep), self.apart)


@dataclasses.dataclass(frozen=True)
class _Pair(Budget):
  """Two budgets, `a` and `b`."""

  a: Budget
  b: Budget

  bound: ClassVar = True

  @property
  def layered(self) -> bool:
    return self.a.layered or self.b.layered


@dataclasses.dataclass(frozen=True)
class Sum(_Pair):
  """What two budgets keep together (H2O: heavy hitters and recent ones)."""

  def count(self, tokens: int, layer: int, depth: int) -> int:
    return sum(bounded(part, tokens, layer, depth) for part in (self.a, self.b))

  def with_keep(self, keep: float) -> "Sum":
    """`keep` in all: half of it for `b`, the rest for `a`, nothing lost.

    What is `Always` there comes on top.
    """
    if isinstance(self.a, Always):
      return Sum(self.a, self.b.with_keep(keep))
    a = self.a.whole if isinstance(self.a, Rest) else self.a
    b = self.b.with_keep(keep / 2)
    return Sum(Rest(a.with_keep(keep), b), b)


@dataclasses.dataclass(frozen=True)
class Rest(Budget):
  """What a budget leaves beyond a part of it, none if the part is larger."""

  whole: Budget
  part: Budget

  bound: ClassVar = True

  @property
  def layered(self) -> bool:
    return self.whole.layered or self.part.layered

  def count(self, tokens: int, layer: int, depth: int) -> int:
    of = lambda budget: bounded(budget, tokens, layer, depth)
    return max(of(self.whole) - of(self.part), 0)

  def with_keep(self, keep: float) -> "Rest":
    return Rest(self.whole.with_keep(keep), self.part.with_keep(keep / 2))


@dataclasses.dataclass(frozen=True)
class Larger(_Pair):
  """The larger of two budgets."""

  def count(self, tokens: int, layer: int, depth: int) -> int:
    return max(bounded(part, tokens, layer, depth) for part in (self.a, self.b))

  def with_keep(self, keep: float) -> Budget:
    return self.b.with_keep(keep)


@dataclasses.dataclass(frozen=True)
class Pyramid(Budget):
  """PyramidKV: more in lower layers, in equal steps (Cai et al., 2024).

  Checked against pyramidkv/pyramidkv_utils.py (c97f9d7) of KVCache-Factory.

  Attributes:
    base: what a layer keeps on average, window included.
    window: last tokens that every layer keeps.
    beta: the highest layer keeps 1 / beta of the average (window apart).
  """

  base: Budget
  window: int = 64
  beta: int = 20

  bound: ClassVar = True

  def count(self, tokens: int, layer: int, depth: int) -> int:
    """Branches as in the official code: short prompts are spared."""
    total = bounded(self.base, tokens, layer, depth)
    b = total - self.window
    if tokens <= total or b <= 0:
      return total
    if tokens < 2 * b or depth < 2:
      return total
    least = b // self.beta
    most = 2 * b - least
    if most >= tokens - self.window:
      most = tokens - self.window
      least = 2 * b - most
    step = (most - least) // (depth - 1)
    return most - layer * step + self.window

  def with_keep(self, keep: float) -> "Pyramid":
    return dataclasses.replace(self, base=self.base.with_keep(keep))


def bounded(budget: Budget, tokens: int, layer: int, depth: int) -> int:
  """The count of a budget; all tokens where it removes nothing."""
  count = budget.count(tokens, layer, depth)
  return tokens if count is None else count


def of(count: int | Budget) -> Budget:
  """A budget from a budget or a number of tokens."""
  return Count(count) if isinstance(count, int) else count


def counts(
  budget: int | Budget, layer: Layer, valid: Bool[Array, "b n"]
) -> Int[Array, "b"]:
  """What prompts that are there whole are entitled to in a layer."""
  of_lengths = layer.ask(table, of(budget), valid.shape[1])
  return jnp.asarray(of_lengths)[valid.sum(axis=1)]


def fixed(budget: int | Budget) -> bool:
  """Whether it is the same for every prompt."""
  if isinstance(budget, Sum | Larger):
    return fixed(budget.a) and fixed(budget.b)
  return isinstance(budget, int | Count)
