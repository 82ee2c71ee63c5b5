"""Signals are questions: what a rule asks of a layer, and the answers.

A question is a frozen dataclass. A rule carries its questions
(`asks(Keys())(rule)`, or as bound options), a model computes the answers to
what is asked and nothing else, and the rule reads `site[question]`. An int
layer counts from the block at which the rule acts: 0 is this block, -1 the one
before. `Block(i)` is block i of the model. Answers of earlier blocks travel
through the plans in between.

At the input of a block, layer 0 is a look-ahead: the block's own projections
of the tokens that arrive, before any is removed (PyramidDrop).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

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


@dataclasses.dataclass(frozen=True)
class By:
  """All queries, each weighted by the answer to another question, `[n]`.

  Attributes:
    signal: non-negative; usually `Derived`, at an absolute `Block`.
  """

  signal: Any


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

  of: By = By(None)

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
class _BeforeBlocks(Question):
  """Asked in a language model, answered before its first block."""

  axes: ClassVar = (0,)

  def at(self, block: int, depth: int) -> int:
    return 0


@dataclasses.dataclass(frozen=True)
class Seen(_BeforeBlocks):
  """What an encoder said about the patch of each visual token, `[n]`.

  Zeros for tokens that are no patches.

  Attributes:
    question: of the encoder. Its layer counts from the last block that runs;
      heads that it leaves are averaged.
    ahead: the block ahead of the features answers, see
      `tokjax.models.vlm_ahead`.
    by: hashable; from the answer about one image, class token included, to a
      number for each of its tokens; None: the answer is that.
  """

  question: Question = Question()
  ahead: bool = False
  by: Callable[[Array], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Origin(_BeforeBlocks):
  """Where visual tokens come from, `[n, 8]`; see `Origins`."""


@dataclasses.dataclass(frozen=True)
class Recalled(_BeforeBlocks):
  """What earlier prompts said of each visual token, `[n]`; zeros: nothing.

  It comes with a prompt, see `tokjax.models.vlm.Prompts`; a decoder by itself
  is told nothing.
  """


@dataclasses.dataclass(frozen=True)
class Merged(_BeforeBlocks):
  """Which visual tokens the encoder made one and gave back as copies, `[n]`.

  Members of one have the same number in a prompt; -1: no visual token.
  """


class Origins(NamedTuple):
  """An answer to `Origin` in its parts, -1 for tokens that are no patches.

  Attributes:
    image: number of the image in its prompt, `[n]`.
    crop: 0 for the whole image, then its crops row by row.
    row, column: in the grid of the crop.
    high, wide: how many crops an image has in rows and columns; 0: none.
    rows, columns: sides of the grid of a crop.
  """

  image: Int[Array, "n"]
  crop: Int[Array, "n"]
  row: Int[Array, "n"]
  column: Int[Array, "n"]
  high: Int[Array, "n"]
  wide: Int[Array, "n"]
  rows: Int[Array, "n"]
  columns: Int[Array, "n"]

  @classmethod
  def of(cls, answer: Int[Array, "n 8"]) -> "Origins":
    return cls(*jnp.moveaxis(answer, -1, 0))


@dataclasses.dataclass(frozen=True)
class Random(Question):
  """A random key for each example and block: `site.key`."""


@dataclasses.dataclass(frozen=True)
class Grid(Question):
  """That the free tokens form a complete grid: `site.grid`."""


ATTENTION = (Rows, Received, Attention)
# Asked of the call, not of a block.
OF_THE_CALL = (Random, Grid)
# Answered by a vision-language model before its language model runs.
OF_IMAGES = (Seen, Origin, Merged)
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


def reduce_heads(x: Array, over: str | None, axis: int = -2) -> Array:
  """Mean, sum or maximum over the axis of heads; None: the array itself."""
  if over is None:
    return x
  return {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[over](x, axis=axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers to questions, in pairs.

  Attributes:
    questions: with absolute layers (static: questions are no keys of a
      pytree, whose keys are sorted).
    values: an array each; leading axis: the batch, or none for one example.
  """

  questions: tuple[Question, ...] = dataclasses.field(
    default=(), metadata={"static": True}
  )
  values: tuple[Array, ...] = ()

  def __post_init__(self):
    if len(set(self.questions)) < len(self.questions):
      raise ValueError(f"a question is answered twice: {self.questions}")

  def __contains__(self, question: Question) -> bool:
    return question in self.questions

  def __getitem__(self, question: Question) -> Array:
    return self.values[self.questions.index(question)]

  def of(self, kind: type[Question]) -> Array:
    """The answer to the only question of a kind.

    Raises:
      ValueError: there is none, or there are several.
    """
    found = [q for q in self.questions if type(q) is kind]
    if len(found) != 1:
      raise ValueError(
        f"{len(found)} questions {kind.__name__} are answered: {found}"
      )
    return self[found[0]]

  def add(self, question: Question, value: Array) -> "Answers":
    """With one more answer, or another answer to a question."""
    pairs = zip(self.questions, self.values, strict=True)
    kept = [*(p for p in pairs if p[0] != question), (question, value)]
    return Answers(tuple(q for q, _ in kept), tuple(v for _, v in kept))

  def only(self, wanted: set[Question] | frozenset[Question]) -> "Answers":
    """Those that are still wanted."""
    pairs = zip(self.questions, self.values, strict=True)
    kept = [(q, v) for q, v in pairs if q in wanted]
    return Answers(tuple(q for q, _ in kept), tuple(v for _, v in kept))

  def moved(self, plan: Any) -> "Answers":
    """Of one example: what the outputs of a plan take from their anchors."""

    def move(question, value):
      for axis in question.axes:
        value = jnp.moveaxis(
          plan.take(jnp.moveaxis(value, axis, 0)), 0, axis
        )
      return value

    values = map(move, self.questions, self.values)
    return dataclasses.replace(self, values=tuple(values))
