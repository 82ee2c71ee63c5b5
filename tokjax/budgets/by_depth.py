"""Budgets that say in which blocks of a model tokens are removed."""

import dataclasses
import math
from fractions import Fraction
from typing import ClassVar, Literal

from tokjax.budgets.base import (
  Budget,
  BudgetError,
  ByBlock,
  Counts,
  block,
  check_count,
  check_keep,
  exact,
  pairs,
  stages,
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
