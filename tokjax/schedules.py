"""How many tokens remain, and where: always static integers.

A schedule maps the number of free (unprotected) tokens and the depth of a
model to one entry a block: how many free tokens remain after that block's
reduction, or None where it does nothing. `with_keep(keep)` gives the schedule
of the same shape that ends with that fraction of the tokens, which is what a
sweep turns.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Literal, Protocol, runtime_checkable

Counts = tuple[int | None, ...]


class ScheduleError(ValueError):
  """A schedule that cannot be carried out; the message names the fix."""


@runtime_checkable
class Schedule(Protocol):
  """A frozen dataclass with these two methods."""

  def counts(self, tokens: int, depth: int) -> Counts:
    """Free tokens that remain after each block; None: no reduction there."""
    ...

  def with_keep(self, keep: float) -> "Schedule":
    """The schedule of this shape that ends with about `keep` * tokens."""
    ...


def check_keep(keep: float, name: str = "keep") -> None:
  """Raises unless `keep` is a fraction; `name` is the argument's."""
  if not (isinstance(keep, int | float) and 0 < keep <= 1):
    raise ScheduleError(f"{name}={keep!r}: must lie in (0, 1]")


def check_count(count: int, name: str) -> None:
  """Raises unless `count` is a whole number of tokens."""
  if not (isinstance(count, int) and count >= 0):
    raise ScheduleError(f"{name}={count!r}: must be a non-negative integer")


def block(layer: int | float, depth: int, name: str = "layer") -> int:
  """The index of a block given as such or as a fraction of the depth.

  Raises:
    ScheduleError: there is no such block.
  """
  index = int(layer * depth) if isinstance(layer, float) else layer
  if not 0 <= index < depth:
    raise ScheduleError(
      f"{name}={layer}: must be a block in 0..{depth - 1} or a fraction of the"
      " depth below 1.0"
    )
  return index


def stages(depth: int) -> tuple[int, ...]:
  """Blocks at one, two and three quarters of the depth: 3, 6, 9 of 12."""
  return tuple(sorted({max(depth * i // 4, 1) for i in (1, 2, 3)}))


def _exact(x: float) -> Fraction:
  """0.7 as seven tenths, so that floor(0.7 * 10) is 7 on every machine."""
  return Fraction(str(x))


@dataclasses.dataclass(frozen=True)
class Constant:
  """Removes `r` tokens in every block from `first` on (ToMe's constant r)."""

  r: int
  first: int = 0

  def __post_init__(self):
    check_count(self.r, "r")

  def counts(self, tokens: int, depth: int) -> Counts:
    first = block(self.first, depth, "first")
    return _removals([0] * first + [self.r] * (depth - first), tokens)

  def with_keep(self, keep: float) -> "Even":
    return Even(keep, self.first)


@dataclasses.dataclass(frozen=True)
class Linear:
  """Removes more early (slope -1: 2r to 0) or late (slope 1: 0 to 2r).

  ToMe's `parse_r`: floor(r (1 - slope)) in the first block, linearly to
  2r - that in the last, rounded down.
  """

  r: int
  slope: float = -1.0

  def __post_init__(self):
    check_count(self.r, "r")
    if not -1 <= self.slope <= 1:
      raise ScheduleError(f"slope={self.slope!r}: must lie in [-1, 1]")

  def counts(self, tokens: int, depth: int) -> Counts:
    low = int(self.r * (1.0 - self.slope))
    high = 2 * self.r - low
    step = (high - low) / max(depth - 1, 1)
    return _removals([int(low + step * i) for i in range(depth)], tokens)

  def with_keep(self, keep: float) -> "Even":
    return Even(keep)


@dataclasses.dataclass(frozen=True)
class Removals:
  """Removes `r[l]` tokens in block l; blocks beyond the list remove none."""

  r: tuple[int, ...]

  def __post_init__(self):
    object.__setattr__(self, "r", tuple(self.r))
    for i, r in enumerate(self.r):
      check_count(r, f"r[{i}]")

  def counts(self, tokens: int, depth: int) -> Counts:
    r = list(self.r[:depth]) + [0] * (depth - len(self.r))
    return _removals(r, tokens)

  def with_keep(self, keep: float) -> "Even":
    return Even(keep)


def _removals(removals: list[int], tokens: int) -> Counts:
  left, counts = tokens, []
  for r in removals:
    left -= r
    counts.append(left if r else None)
  return tuple(counts)


@dataclasses.dataclass(frozen=True)
class Even:
  """As many in every block from `first` on (up to rounding), ends at `keep`."""

  keep: float
  first: int = 0

  def __post_init__(self):
    check_keep(self.keep)

  def counts(self, tokens: int, depth: int) -> Counts:
    gone = tokens - max(1, round(tokens * _exact(self.keep)))
    first = block(self.first, depth, "first")
    done = [max(i + 1 - first, 0) for i in range(depth)]
    left = [tokens - gone * i // (depth - first) for i in done]
    before = [tokens] + left[:-1]
    return tuple(
      None if b == a else a for b, a in zip(before, left, strict=True)
    )

  def with_keep(self, keep: float) -> "Even":
    return Even(keep, self.first)


@dataclasses.dataclass(frozen=True)
class Ratio:
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
        raise ScheduleError(
          f"{name}={getattr(self, name)!r}: must be one of {allowed}"
        )
    if self.layers is not None and self.layers != "all":
      object.__setattr__(self, "layers", tuple(self.layers))

  def _layers(self, depth: int) -> tuple[int, ...]:
    if self.layers == "all":
      return tuple(range(depth))
    layers = stages(depth) if self.layers is None else self.layers
    return tuple(block(layer, depth, "layers") for layer in layers)

  def counts(self, tokens: int, depth: int) -> Counts:
    rounding = math.floor if self.rounding == "floor" else math.ceil
    left, exact, counts = tokens, Fraction(tokens), []
    layers = self._layers(depth)
    for layer in range(depth):
      if layer not in layers:
        counts.append(None)
        continue
      exact *= _exact(self.rho)
      base = exact if self.base == "initial" else left * _exact(self.rho)
      kept = rounding(base)
      if kept >= left:
        counts.append(None)
        continue
      left = min(kept + self.extra, left)
      counts.append(left)
    return tuple(counts)

  def with_keep(self, keep: float) -> "KeepTo":
    return KeepTo(keep, self)


@dataclasses.dataclass(frozen=True)
class KeepTo:
  """`ratio` with the rho that ends at `keep` after however many stages."""

  keep: float
  ratio: Ratio

  def __post_init__(self):
    check_keep(self.keep)

  def counts(self, tokens: int, depth: int) -> Counts:
    stages_ = len(self.ratio._layers(depth))
    rho = round(self.keep ** (1 / max(stages_, 1)), 6)
    return dataclasses.replace(self.ratio, rho=rho).counts(tokens, depth)

  def with_keep(self, keep: float) -> "KeepTo":
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class Once:
  """Keeps the fraction `keep` at one block, 0 by default.

  Attributes:
    keep: fraction kept, rounded to the nearest integer, at least one.
    layer: the block, or a fraction of the depth (0.5: half way).
  """

  keep: float
  layer: int | float = 0

  def __post_init__(self):
    check_keep(self.keep)

  def counts(self, tokens: int, depth: int) -> Counts:
    layer = block(self.layer, depth)
    left = max(1, round(tokens * _exact(self.keep)))
    none = (None,) * depth
    if left == tokens:
      return none
    return none[:layer] + (left,) + none[layer + 1 :]

  def with_keep(self, keep: float) -> "Once":
    return dataclasses.replace(self, keep=keep)


@dataclasses.dataclass(frozen=True)
class Square(Once):
  """`Once`, rounded to a square number: for poolers that need a grid."""

  def counts(self, tokens: int, depth: int) -> Counts:
    side = max(1, round(math.sqrt(tokens * self.keep)))
    exact = Once(min(side * side / tokens, 1.0), self.layer)
    return exact.counts(tokens, depth)


@dataclasses.dataclass(frozen=True)
class Capped:
  """Room for the fraction `keep` of the tokens in every block from `layer` on.

  For methods that choose how many they keep (an upper bound, filled up with
  masked tokens), and for those that give all tokens back after each block.
  """

  keep: float
  layer: int | float = 0

  def __post_init__(self):
    check_keep(self.keep)

  def counts(self, tokens: int, depth: int) -> Counts:
    first = block(self.layer, depth)
    room = max(1, round(tokens * _exact(self.keep)))
    return (None,) * first + (room,) * (depth - first)

  def with_keep(self, keep: float) -> "Capped":
    return Capped(keep, self.layer)


@dataclasses.dataclass(frozen=True)
class Fixed:
  """The counts themselves, one entry a block, None for none."""

  after: Counts

  def __post_init__(self):
    object.__setattr__(self, "after", tuple(self.after))
    for i, after in enumerate(self.after):
      if after is not None:
        check_count(after, f"after[{i}]")

  def counts(self, tokens: int, depth: int) -> Counts:
    if len(self.after) != depth:
      raise ScheduleError(
        f"after={self.after}: has {len(self.after)} entries, one for each of"
        f" the {depth} blocks is needed"
      )
    return self.after

  def with_keep(self, keep: float) -> "Even":
    return Even(keep)


def check(
  counts: Counts, tokens: int, *, recipe: str, at_most: float = 1.0
) -> Counts:
  """Raises if a schedule runs out of tokens or asks for too much at once.

  Args:
    counts: what the schedule says.
    tokens: free tokens at the input.
    recipe: named in the error.
    at_most: the largest fraction one step of this method can remove.
  """
  left = tokens
  for layer, after in enumerate(counts):
    if after is None:
      continue
    least = left - math.floor(left * _exact(at_most))
    if after < 1:
      raise ScheduleError(
        f"{recipe}: the schedule runs out of tokens at block {layer}: {left}"
        f" are left and {left - after} would be removed; at least 1 must"
        " remain. Remove fewer per block or keep a larger fraction."
      )
    if after < least:
      raise ScheduleError(
        f"{recipe}: block {layer} would remove {left - after} of {left} tokens;"
        f" one step of this method removes at most {left - least}. Spread the"
        " reduction over more blocks or keep more."
      )
    if after > left:
      raise ScheduleError(
        f"{recipe}: block {layer} is to leave {after} tokens but only {left}"
        " arrive there. Leave fewer, or remove fewer before it."
      )
    left = after
  return counts
