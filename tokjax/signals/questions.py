"""Questions: what a rule asks of a layer, of a call, or about tokens."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import jax
from jaxtyping import Array

from tokjax.tokens import Kind


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
  if value not in allowed:
    raise ValueError(f"{name}={value!r}: must be one of {allowed}")


@dataclasses.dataclass(frozen=True)
class Block:
  """A block by its index in the model, or by a fraction of the depth."""

  index: int | float


Where = int | Block


@dataclasses.dataclass(frozen=True)
class Last:
  """Queries of the last real tokens of a sequence."""

  count: int = 1

  def __post_init__(self):
    if self.count < 1:
      raise ValueError(f"count={self.count}: must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Of:
  """Queries of the tokens of some kinds; with `first`, of the first one only.

  `first` says that one row is enough (the class token).
  """

  kinds: tuple[Kind, ...]
  first: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
  """Base of the questions.

  Attributes:
    layer: the block that answers: 0 or less, relative to the one that asks,
      or `Block(i)`.

  Class attributes:
    axes: token axes of the answer of one example, through which it travels.
  """

  layer: Where = 0

  is_question: ClassVar[bool] = True
  axes: ClassVar[tuple[int, ...]] = ()

  def __post_init__(self):
    if isinstance(self.layer, int) and self.layer > 0:
      raise ValueError(
        f"layer={self.layer}: must be 0 or less, relative to the block that"
        " asks, or Block(i)"
      )

  def at(self, block: int, depth: int) -> int:
    """The index of the block that answers; negative: there is none."""
    if isinstance(self.layer, Block):
      index = self.layer.index
      return int(index * depth) if isinstance(index, float) else index
    return block + self.layer

  def about(self, block: int, depth: int) -> bool:
    """Whether a block takes part in the answer, once `layer` is absolute."""
    return self.at(block, depth) == block

  def answered(self, block: int) -> "Question":
    """The same question with an absolute layer."""
    return dataclasses.replace(self, layer=Block(block))


@dataclasses.dataclass(frozen=True)
class By:
  """All queries, each weighted by the answer to another question, `[n]`.

  Attributes:
    signal: non-negative; usually `Derived`, at an absolute `Block`.
  """

  signal: Question


@dataclasses.dataclass(frozen=True)
class Rows(Question):
  """Attention of some queries, averaged over them, `[h, n]` or `[n]`.

  Attributes:
    of: whose rows.
    form: "softmax" (probabilities over the whole sequence that a query sees),
      "logits" (scaled products; not masked) or "by_rotation" (probabilities,
      each divided by the scaled product of a query and a key of ones at the
      same two places, which rotary positions alone make near 0 or negative far
      away; asked of a decoder, `of` a signal).
    over: how heads are reduced; None: they are not, `[h, n]`.
  """

  of: Last | Of | By = Last()
  form: Literal["softmax", "logits", "by_rotation"] = "softmax"
  over: Literal["mean", "sum", "max"] | None = None

  axes: ClassVar = (-1,)

  def __post_init__(self):
    super().__post_init__()
    _one_of("form", self.form, ("softmax", "logits", "by_rotation"))
    if self.form == "by_rotation" and not isinstance(self.of, By):
      raise ValueError(
        f"of={self.of}: form='by_rotation' is answered for By(signal) only"
      )
    _one_of("over", self.over, ("mean", "sum", "max", None))


@dataclasses.dataclass(frozen=True)
class Received(Question):
  """Attention that tokens receive: column means over real queries, `[h, n]`."""

  axes: ClassVar = (-1,)


@dataclasses.dataclass(frozen=True)
class Peaks(Question):
  """The most attention that tokens receive from one of some queries, `[n]`.

  Mean over heads; asked of a decoder.

  Attributes:
    of: whose rows: those to which the signal gives a positive number.
  """

  of: By = dataclasses.field(kw_only=True)

  axes: ClassVar = (-1,)


@dataclasses.dataclass(frozen=True)
class Attention(Question):
  """The whole map, rows are queries, `[h, n, n]`; expensive for long texts."""

  axes: ClassVar = (-2, -1)


@dataclasses.dataclass(frozen=True)
class Queries(Question):
  """Queries of every head, not rotated, `[h, n, k]`."""

  axes: ClassVar = (-2,)


@dataclasses.dataclass(frozen=True)
class Keys(Question):
  """Keys of every head, `[h, n, k]`.

  Attributes:
    rotated: to their positions; False: not; None: either (lengths do not
      change).
  """

  rotated: bool | None = False

  axes: ClassVar = (-2,)


@dataclasses.dataclass(frozen=True)
class Values(Question):
  """Values of every head, `[h, n, k]`."""

  axes: ClassVar = (-2,)


@dataclasses.dataclass(frozen=True)
class Hidden(Question):
  """Hidden states at a block's input, `[n, d]`."""

  axes: ClassVar = (-2,)


@dataclasses.dataclass(frozen=True)
class Derived(Question):
  """What a function makes of the tokens at a block's input, `[n, ...]`.

  Attributes:
    fn: from `Tokens` of one example to an array whose first axis is tokens;
      hashable.
  """

  fn: Callable[[Any], Array] = lambda tokens: tokens.x

  axes: ClassVar = (0,)

  def of_batch(self, tokens: Any) -> Array:
    """The answer for a batch of tokens."""
    return jax.vmap(self.fn)(tokens)


@dataclasses.dataclass(frozen=True)
class Transition(Question):
  """How far sub-layers move each token, summed over blocks, `[n]`.

  See `tokjax.scores.transition`; zeros where no block has run yet. Tokens that
  remain carry their sums on.

  Attributes:
    layer: the last block of the sum.
    since: the first one, as a number or a fraction of the depth.
  """

  layer: Where = -1
  since: int | float = 0

  axes: ClassVar = (0,)

  def at(self, block: int, depth: int) -> int:
    return max(super().at(block, depth), 0)

  def about(self, block: int, depth: int) -> bool:
    last = self.at(block, depth)
    return block == last or self.counts(block, depth) and block < last

  def counts(self, block: int, depth: int) -> bool:
    """Whether a block is not before the first of the sum."""
    since = dataclasses.replace(self, layer=Block(self.since))
    return block >= since.at(block, depth)


@dataclasses.dataclass(frozen=True)
class Random(Question):
  """A random key for each example and block: `site.key`."""


@dataclasses.dataclass(frozen=True)
class Grid(Question):
  """That the free tokens form a complete grid: `site.grid`."""


# Asked of the call, not of a block.
OF_THE_CALL = (Random, Grid)
# Asked about tokens, which needs no attention.
OF_TOKENS = (Hidden, Derived)
CLASS = Rows(of=Of((Kind.CLASS,), first=True))


def asks(*questions: Question):
  """Attaches questions to a rule; a rule is a module-level function."""

  def attach(rule):
    rule.asks = questions
    return rule

  return attach


def questions_of(rule: Any) -> tuple[Question, ...]:
  """The questions a rule carries, those that others rest on first."""
  asked = tuple(getattr(rule, "asks", ()))
  under = [q.of.signal for q in asked if isinstance(getattr(q, "of", 0), By)]
  return (*(q for q in under if q not in asked), *asked)


def unanswered(question: Any, kinds: Iterable[Kind]) -> list[str]:
  """Names of the kinds whose attention is asked for, if there are none of them.

  Args:
    question: any; one that is not about `Of` has none.
    kinds: of the tokens that a model has.
  """
  of = getattr(question, "of", None)
  if not isinstance(of, Of) or set(of.kinds) & set(kinds):
    return []
  return [kind.name for kind in of.kinds]
