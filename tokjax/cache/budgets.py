"""How many tokens of a prompt a cache keeps: static integers for every length.

A budget maps the number of real tokens of a prompt to the number kept, layer by
layer. Ragged batches look their lengths up in its `table`, so that a padded
example keeps what it would keep alone.
"""

import dataclasses
import functools
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tokjax import schedules

_exact = functools.cache(schedules._exact)


@runtime_checkable
class Budget(Protocol):
  """A frozen dataclass with these two methods.

  One whose attribute `layered` is False counts alike in all layers, so that
  one table serves them all.
  """

  def count(self, tokens: int, layer: int, depth: int) -> int:
    """How many of `tokens` real tokens that layer keeps; may exceed them."""
    ...

  def with_keep(self, keep: float) -> "Budget":
    """The budget of this shape that keeps about that fraction."""
    ...


@dataclasses.dataclass(frozen=True)
class Tokens:
  """At most so many tokens, whatever the prompt."""

  tokens: int

  layered = False

  def __post_init__(self):
    schedules.check_count(self.tokens, "tokens")

  def count(self, tokens: int, layer: int, depth: int) -> int:
    return self.tokens

  def with_keep(self, keep: float) -> "Share":
    return Share(keep)


@dataclasses.dataclass(frozen=True)
class Always(Tokens):
  """So many tokens however the rest of a budget is turned: sinks."""

  def with_keep(self, keep: float) -> "Always":
    return self


@dataclasses.dataclass(frozen=True)
class Share:
  """A fraction of the prompt, rounded, and at least so many."""

  keep: float
  rounding: Literal["floor", "nearest"] = "floor"
  least: int = 1

  layered = False

  def __post_init__(self):
    schedules.check_keep(self.keep)
    if self.rounding not in ("floor", "nearest"):
      raise ValueError(
        f"rounding={self.rounding!r}: must be 'floor' or 'nearest'"
      )

  def count(self, tokens: int, layer: int, depth: int) -> int:
    exact = _exact(self.keep)
    kept = tokens * exact.numerator // exact.denominator
    if self.rounding == "nearest":
      kept = round(tokens * exact)
    return max(kept, self.least)

  def with_keep(self, keep: float) -> "Share":
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class Sum:
  """What two budgets keep together (H2O: heavy hitters and recent ones)."""

  a: Budget
  b: Budget

  @property
  def layered(self) -> bool:
    return _layered(self.a) or _layered(self.b)

  def count(self, tokens: int, layer: int, depth: int) -> int:
    of = lambda part: part.count(tokens, layer, depth)
    return of(self.a) + of(self.b)

  def with_keep(self, keep: float) -> "Sum":
    if isinstance(self.a, Always):
      return Sum(self.a, self.b.with_keep(keep))
    return Sum(self.a.with_keep(keep / 2), self.b.with_keep(keep / 2))


@dataclasses.dataclass(frozen=True)
class Larger:
  """The larger of two budgets."""

  a: Budget
  b: Budget

  @property
  def layered(self) -> bool:
    return _layered(self.a) or _layered(self.b)

  def count(self, tokens: int, layer: int, depth: int) -> int:
    of = lambda part: part.count(tokens, layer, depth)
    return max(of(self.a), of(self.b))

  def with_keep(self, keep: float) -> Budget:
    return self.b.with_keep(keep)


@dataclasses.dataclass(frozen=True)
class Pyramid:
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

  def count(self, tokens: int, layer: int, depth: int) -> int:
    """Branches as in the official code: short prompts are spared."""
    total = self.base.count(tokens, layer, depth)
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


def _layered(budget: Budget) -> bool:
  return getattr(budget, "layered", True)


def table(budget: Budget, prompt: int, layer: int, depth: int) -> np.ndarray:
  """What every length up to `prompt` is entitled to, int32 `[prompt + 1]`."""
  at = (layer, depth) if _layered(budget) else (0, 1)
  return _table(budget, prompt, *at)


@functools.lru_cache(maxsize=256)
def _table(budget: Budget, prompt: int, layer: int, depth: int) -> np.ndarray:
  kept = [budget.count(n, layer, depth) for n in range(prompt + 1)]
  return np.asarray(kept, np.int32)


def of(count: int | Budget) -> Budget:
  """A budget from a budget or a number of tokens."""
  return Tokens(count) if isinstance(count, int) else count


def counts(
  budget: int | Budget, layer: int, depth: int, valid: Bool[Array, "b n"]
) -> Int[Array, "b"]:
  """What prompts that are there whole are entitled to."""
  of_lengths = table(of(budget), valid.shape[1], layer, depth)
  return jnp.asarray(of_lengths)[valid.sum(axis=1)]


def fixed(budget: int | Budget) -> bool:
  """Whether it is the same whatever the prompt."""
  if isinstance(budget, Sum | Larger):
    return fixed(budget.a) and fixed(budget.b)
  return isinstance(budget, int | Tokens)
