"""Tokens on their way through the blocks, with what reductions left on it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.models.unmerged import Places
from tokjax.plan import Plan
from tokjax.reduce.back import Back
from tokjax.reduce.stage import Stage
from tokjax.signals import Answers
from tokjax.tokens import Kind, Tokens

# The kinds that are counted together, in order: dictionaries of them are trees.
Group = tuple[Kind, ...]


def group_of(stage: Stage) -> Group:
  """The kinds that a stage reduces."""
  return tuple(sorted(set(stage.reduce.free.kinds)))


def static(**options: Any) -> Any:
  """A field that is no array."""
  return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Away:
  """Tokens that a stage took away, to be given back.

  Attributes:
    plan: of the stage that took them.
    passage: before it.
    stage: what planned (static).
    back: how they come back (static).
    later: plans made since, with the tokens before each.
  """

  plan: Plan
  passage: "Passage"
  stage: Stage = static()
  back: Back = static()
  later: tuple[tuple[Plan, Tokens], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Passage:
  """Tokens on their way through the blocks, with what rules are told.

  Attributes:
    tokens: of the batch.
    answers: that are still wanted.
    counts: tokens of each group of kinds that are left in each example, where
      counts differ between examples.
    initial: the same at the input.
    carries: what rules carry on, by the number of the reduction.
    away: what is to be given back, the latest last.
    plans: of every block so far.
    in_force: those that have not been given back.
    gaps: tokens were removed and the others kept their positions (static).
    memory: what reductions that fill from a memory leave for the next call,
      by block and number.
    ids: what else travels with the tokens, in a language model their ids.
    length: real tokens of each example at the input, in a language model.
    shift: what renumbering took from the positions of each example, so far.
    attended: the shift at which the latest attention ran.
    places: where members of outputs stand in attention, behind a reduction that
      is unmerged.
  """

  tokens: Tokens
  answers: Answers = Answers()
  counts: dict[Group, Int[Array, "b"]] = dataclasses.field(default_factory=dict)
  initial: dict[Group, Int[Array, "b"]] = dataclasses.field(
    default_factory=dict
  )
  carries: dict[int, Any] = dataclasses.field(default_factory=dict)
  away: tuple[Away, ...] = ()
  plans: tuple[tuple[Plan, ...], ...] = ()
  in_force: tuple[Plan, ...] = ()
  gaps: bool = static(default=False)
  memory: dict[tuple[int, int], Float[Array, "b n d"]] = dataclasses.field(
    default_factory=dict
  )
  ids: Int[Array, "b n"] | None = None
  length: Int[Array, "b"] | None = None
  shift: Int[Array, "b"] | None = None
  attended: Int[Array, "b"] | None = None
  places: Places | None = None

  def replace(self, **changes) -> "Passage":
    return dataclasses.replace(self, **changes)

  def with_plan(self, plan: Plan) -> "Passage":
    """With one more plan of the block that it is in."""
    *before, last = self.plans
    return self.replace(
      plans=(*before, (*last, plan)), in_force=(*self.in_force, plan)
    )


def renumbered(passage: Passage) -> Passage:
  """Positions counted anew from 0; the next token follows what remains.

  That holds where the last token of a text was removed, too. Only the place is
  counted: coordinates on several axes stay with their tokens, since rows and
  columns of an image do not close up.
  """
  tokens = passage.tokens
  real = jnp.ones(tokens.kind.shape, bool)
  real = real if tokens.mask is None else tokens.mask
  place = jnp.maximum(jnp.cumsum(real, axis=-1) - 1, 0)
  place = place[..., None].astype(tokens.position.dtype)
  position = jnp.concatenate([place, tokens.position[..., 1:]], axis=-1)
  return passage.replace(
    tokens=tokens.replace(position=position),
    shift=passage.length - real.sum(axis=-1, dtype=jnp.int32),
    gaps=False,
  )
