"""Budgets of methods that remove tokens in stages, at some blocks."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from tokjax.budgets.base import (
  Budget,
  BudgetError,
  ByBlock,
  block,
  check_count,
  check_keep,
  exact,
  pairs,
  stages,
)


@dataclasses.dataclass(frozen=True)
class Ratio(Budget):
  """Keeps the fraction `rho` at each of some blocks.

  Attributes:
    rho: fraction kept at each.
    layers: which blocks; None: `stages(depth)`; "all": every block.
    base: fraction of the "current" tokens, or rho^t of the "initial" ones.
    rounding: of the number of tokens kept.
    extra: outputs added to the kept ones (EViT's fused token). Where rounding
      keeps all tokens nothing happens, and nothing is added.
  """

  rho: float
  layers: tuple[int, ...] | Literal["all"] | None = None
  base: Literal["initial", "current"] = "initial"
  rounding: Literal["floor", "ceil"] = "floor"
  extra: int = 0

  def __post_init__(self):
    check_keep(self.rho, "rho")
    check_count(self.extra, "extra")
    for name, allowed in (
      ("base", ("initial", "current")),
      ("rounding", ("floor", "ceil")),
    ):
      if getattr(self, name) not in allowed:
        raise BudgetError(
          f"{name}={getattr(self, name)!r}: must be one of {allowed}"
        )
    if self.layers is not None and self.layers != "all":
      object.__setattr__(self, "layers", tuple(self.layers))

  @property
  def of(self) -> str:
    return "arriving" if self.base == "current" else "initial"

  def blocks(self, depth: int) -> tuple[int, ...]:
    """The blocks at which it acts."""
    if self.layers == "all":
      return tuple(range(depth))
    layers = stages(depth) if self.layers is None else self.layers
    return tuple(sorted(block(layer, depth, "layers") for layer in layers))

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    rounding = math.floor if self.rounding == "floor" else math.ceil
    blocks = self.blocks(depth)
    if layer not in blocks:
      return None
    times = 1 if self.base == "current" else blocks.index(layer) + 1
    left, share, acts = tokens, Fraction(1), False
    for _ in range(times):
      share *= exact(self.rho)
      kept = rounding(tokens * share)
      acts = kept < left
      left = min(kept + self.extra, left) if acts else left
    return left if acts else None

  def with_keep(self, keep: float) -> "KeepTo":
    return KeepTo(keep, self)


@dataclasses.dataclass(frozen=True)
class KeepTo(Budget):
  """`ratio` with the rho that ends at `keep` after however many stages."""

  keep: float
  ratio: Ratio

  def __post_init__(self):
    check_keep(self.keep)

  @property
  def of(self) -> str:
    return self.ratio.of

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    stages_ = len(self.ratio.blocks(depth))
    rho = round(self.keep ** (1 / max(stages_, 1)), 6)
    return dataclasses.replace(self.ratio, rho=rho).count(tokens, layer, depth)

  def with_keep(self, keep: float) -> "KeepTo":
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class Stages(Budget):
  """Keeps fractions of the initial tokens at some blocks, rounded down.

  Attributes:
    shares: blocks and the fraction that remains there, a dict or pairs.
      `with_keep` sets the last one and takes the others to the same power.
  """

  shares: ByBlock | dict[int | float, int | float]

  def __post_init__(self):
    object.__setattr__(self, "shares", pairs(self.shares))
    for at, share in pairs(self.shares):
      check_keep(share, f"shares[{at}]")

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    left = tokens
    for at, share in sorted(
      (block(at, depth, "shares"), share) for at, share in pairs(self.shares)
    ):
      kept = max(1, math.floor(tokens * exact(share)))
      if at == layer:
        return None if kept >= left else kept
      left = min(left, kept)
    return None

  def with_keep(self, keep: float) -> "Stages":
    check_keep(keep)
    shares = pairs(self.shares)
    last = shares[-1][1]
    power = math.log(keep) / math.log(last) if last < 1 else 1.0
    turned = [(at, round(share**power, 6)) for at, share in shares]
    turned[-1] = (turned[-1][0], keep)
    return Stages(tuple(turned))
