"""A recipe's reductions inside the blocks of a foreign encoder.

The tokens, with their sizes, positions, kinds and mask, are a `Passage`, and a
block tells it where it is:

    passage = foreign.start(slots, x, depth=len(blocks), kinds=(Kind.CLASS,))
    for block in blocks:
      passage = passage.enter()                         # place "input"
      ...                                               # attention of passage.x
      passage = passage.attended(passage.x + y, q, k, v)    # place "mlp"
      passage = passage.leave(passage.x + block.mlp(passage.x))    # "output"
    tokens, plans = passage.finish()

Every step returns a new passage. A passage is a pytree: it goes through
`jax.jit`, `jax.checkpoint` and `nn.remat`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray

from tokjax.foreign.recorder import Recorder
from tokjax.foreign.refusals import check, needed
from tokjax.models import passage as passage_lib
from tokjax.models.answers import EncoderAnswers
from tokjax.models.reducer import Reducer, key_bias, sequence_of_patches
from tokjax.plan import Plan, move_batch
from tokjax.reduce.stages import Stages, plan_stages
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens


@dataclasses.dataclass(frozen=True)
class _Course:
  """What is static about a passage; hashable.

  Attributes:
    slots: the recipe.
    stages: its reductions, of every block.
    kinds: of the tokens in front.
    ragged: examples differ in how many tokens are real.
  """

  slots: Slots
  stages: Stages
  kinds: tuple[Kind, ...]
  ragged: bool


def start(
  slots: Slots,
  x: Float[Array, "b n d"],
  *,
  depth: int,
  kinds: tuple[Kind, ...] = (),
  grid: tuple[int, ...] | None = None,
  position: Float[Array, "b n p"] | None = None,
  mask: Bool[Array, "b n"] | None = None,
  key: PRNGKeyArray | None = None,
) -> "Passage":
  """The passage of a batch in front of the first block.

  Args:
    slots: what a recipe returned, such as `recipes.get("tome", keep=0.5)`.
    x: embedded tokens; those of `kinds` lead, patches follow.
    depth: number of blocks (static).
    kinds: of the leading tokens, which no reduction touches: (Kind.CLASS,).
    grid: sides of the grid of patches, for recipes that need one.
    position: of every token; default: 0..n-1.
    mask: tokens that are real; None: all. Padding may hold anything.
    key: for recipes that are random, one key for the batch.

  Raises:
    ValueError: what the recipe asks for and a foreign block cannot carry out,
      a budget that does not suit `depth`, or arguments that do not fit.
  """
  batch, n, _ = x.shape
  patches = n - len(kinds)
  check(slots, patches, kinds, grid)
  if mask is not None:
    # A product with what is not real would be NaN if that were: 0 * NaN.
    x = jnp.where(mask[:, :, None], x, 0)
  kind = jnp.asarray([*kinds, *[Kind.PATCH] * patches], jnp.int32)
  if position is None:
    position = jnp.arange(n, dtype=jnp.float32)[None, :, None]
    position = jnp.broadcast_to(position, (batch, n, 1))
  tokens = Tokens(
    x, jnp.ones((batch, n), jnp.float32), position,
    jnp.broadcast_to(kind, (batch, n)), mask,
  )  # fmt: skip
  stages = plan_stages(
    slots.reduce, sequence_of_patches(patches, len(kinds), grid), depth,
    recipe=slots.name,
  )  # fmt: skip
  course = _Course(slots, stages, kinds, mask is not None)
  reducer = Reducer.create(
    slots, stages, batch, masked=course.ragged, ragged=course.ragged, key=key
  )
  return Passage(course, reducer.start(tokens), reducer.keys)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Passage:
  """Tokens on their way through foreign blocks; see the module.

  Attributes:
    course: what is static about it.
    inner: the tokens, and what rules are told.
    keys: a random key for each example, where the recipe needs one.
    layer: number of the block that it is in or in front of (static).
    place: what came last, "leave", "enter" or "attended" (static).
  """

  course: _Course
  inner: passage_lib.Passage
  keys: Key[Array, "b"] | None = None
  layer: int = 0
  place: str = "leave"

  @property
  def tokens(self) -> Tokens:
    return self.inner.tokens

  @property
  def x(self) -> Float[Array, "b n d"]:
    """Features of the tokens that are left."""
    return self.tokens.x

  @property
  def mask(self) -> Bool[Array, "b n"] | None:
    """Tokens that are real; None: all."""
    return self.tokens.mask

  @property
  def bias(self) -> Float[Array, "b 1 1 n"] | None:
    """To be added to the logits of every attention; None: nothing.

    It hides tokens that are padding, and lets merged ones count by size where
    the recipe says so.
    """
    bias = key_bias(self.tokens) if self.course.slots.proportional else None
    if self.mask is not None:
      bias = jnp.where(self.mask, 0.0 if bias is None else bias, -jnp.inf)
    return None if bias is None else bias[:, None, None, :]

  def attention(self, function: Callable[..., Array]) -> "Recorder":
    """An attention function with `bias`, for modules that take `attention_fn`.

    Args:
      function: called with queries, keys and values `[b, n, h, k]`, `bias` and
        what the module passes, such as `nn.dot_product_attention`.
    """
    return Recorder(function, self.bias)

  def enter(self) -> "Passage":
    """Enters a block: reductions at its input."""
    self._check_place("enter")
    if self.layer >= self._depth:
      raise ValueError(
        f"depth={self._depth}: block {self.layer} is entered, and the last was"
        f" to be {self._depth - 1}; pass the number of blocks to start"
      )
    inner = self.inner.replace(plans=(*self.inner.plans, ()))
    asked = self._reducer.asked_at(self.layer, "input")
    self._check_asked(asked, None, None, None, None)
    known = self._known(None, None, None, None)
    inner = inner.replace(answers=known.add_to(inner.answers, asked))
    return self._with(inner, "enter")._reduced("input")

  def attended(
    self,
    x: Float[Array, "b n d"],
    q: Float[Array, "b n h k"] | None = None,
    k: Float[Array, "b n g k"] | None = None,
    v: Float[Array, "b n g e"] | None = None,
    *,
    attention: Float[Array, "b h n n"] | None = None,
  ) -> "Passage":
    """Between attention and MLP: answers what rules ask, and reduces.

    Args:
      x: behind attention, the residual added.
      q, k, v: what attention was computed from, for recipes that ask for keys,
        values or rows of the attention map.
      attention: the map, if the block computes it anyway or differently.

    Raises:
      ValueError: a rule asks for what is not given.
    """
    self._check_place("attended")
    asked = self._reducer.asked_of_attention(self.layer)
    self._check_asked(asked, q, k, v, attention)
    known = self._known(q, k, v, attention)
    inner = self._with_features(x)
    answers = known.add_to(inner.answers, asked)
    inner = inner.replace(answers=answers)
    return self._with(inner, "attended")._reduced("mlp")

  def leave(self, x: Float[Array, "b n d"]) -> "Passage":
    """Leaves a block: reductions at its output.

    Args:
      x: behind the MLP, the residual added.
    """
    self._check_place("leave")
    left = self._with(self._with_features(x), "leave")._reduced("output")
    return dataclasses.replace(left, layer=self.layer + 1)

  def finish(self) -> tuple[Tokens, list[list[Plan]]]:
    """The tokens behind the last block, and the plans of every block.

    Raises:
      ValueError: there were fewer blocks than `depth`.
    """
    if self.place != "leave" or self.layer != self._depth:
      raise ValueError(
        f"depth={self._depth}: only {self.layer} blocks were left; pass the"
        " number of blocks to start"
      )
    return self.tokens, [list(plans) for plans in self.inner.plans]

  @property
  def _depth(self) -> int:
    return len(self.course.stages)

  @property
  def _reducer(self) -> Reducer:
    course = self.course
    return Reducer(course.stages, self.keys, ragged=course.ragged)

  def _with(self, inner: passage_lib.Passage, place: str) -> "Passage":
    return dataclasses.replace(self, inner=inner, place=place)

  def _with_features(self, x: Array) -> passage_lib.Passage:
    if x.shape != self.x.shape:
      raise ValueError(
        f"x has shape {x.shape}, must be {self.x.shape} in block {self.layer}:"
        " compute it from passage.x"
      )
    return self.inner.replace(tokens=self.tokens.replace(x=x))

  def _reduced(self, at: str) -> "Passage":
    reducer, inner = self._reducer, self.inner
    for stage in reducer.at(self.layer, at):
      plan, inner = reducer.plan(stage, inner)
      few = move_batch(plan, inner.tokens)
      inner = reducer.moved(stage, plan, inner, few).with_plan(plan)
    return self._with(inner, self.place)

  def _known(self, q, k, v, attention) -> EncoderAnswers:
    """What this block answers; what is not given was not asked for."""
    bias = key_bias(self.tokens) if self.course.slots.proportional else None
    nothing = jnp.zeros((*self.x.shape[:2], 0, 0))
    q, k, v = (
      jnp.swapaxes(nothing if x is None else x, 1, 2) for x in (q, k, v)
    )
    known = EncoderAnswers(
      self.layer, self.course.kinds, self.tokens, q, k, v,
      {"bias": bias, "mask": self.mask}, attention is not None,
    )  # fmt: skip
    if attention is not None:
      known.map = attention
    return known

  def _check_asked(self, asked, q, k, v, attention) -> None:
    given = {"q": q, "k": k, "v": v, "attention": attention}
    for question in sorted(asked, key=repr):
      takes = needed(question, attention is not None)
      if missing := [name for name in takes if given[name] is None]:
        raise ValueError(
          f"recipe {self.course.slots.name!r} asks {type(question).__name__} of"
          f" block {self.layer}, which takes {' and '.join(takes)}; pass"
          f" {', '.join(f'{name}=' for name in missing)} to attended"
        )

  def _check_place(self, now: str) -> None:
    before = {"enter": "leave", "attended": "enter", "leave": "attended"}[now]
    if self.place != before:
      raise ValueError(
        f"block {self.layer}: {now} comes behind {before}, and the passage is"
        f" behind {self.place}; call enter, attended and leave in each block,"
        " each on what the one before returned"
      )

  def tree_flatten(self):
    return (self.inner, self.keys), (self.course, self.layer, self.place)

  @classmethod
  def tree_unflatten(cls, static, arrays):
    course, layer, place = static
    inner, keys = arrays
    return cls(course, inner, keys, layer, place)
