"""What a model needs to carry out the reductions of its slots."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from tokjax.models.passage import (
  Away,
  Group,
  Passage,
  group_of,
  renumbered,
)
from tokjax.models.unmerged import Places
from tokjax.plan import Plan, move_batch
from tokjax.reduce import stages as stages_lib
from tokjax.reduce.back import given_back
from tokjax.reduce.stage import Stage
from tokjax.reduce.stages import Sequence, Stages
from tokjax.signals import OF_THE_CALL, Answers, Question
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens


def key_bias(tokens: Tokens) -> Float[Array, "b n"]:
  """log(size): attention in which a merged token counts as all its members."""
  return jnp.log(jnp.maximum(tokens.size, 1e-6))


def take_rows(
  plan: Plan, q: Float[Array, "b h n k"]
) -> Float[Array, "b h m k"]:
  """The anchors' rows, for every head."""
  return jax.vmap(lambda p, q: jax.vmap(p.take)(q))(plan, q)


def merge_map(
  plan: Plan, weight: Float[Array, "b h n n"]
) -> Float[Array, "b h m m"]:
  """Attention maps between merged tokens: rows averaged, columns summed."""

  def one(plan, weight):
    return jax.vmap(plan.total)(plan.apply(weight))

  return jax.vmap(lambda p, w: jax.vmap(lambda a: one(p, a))(w))(plan, weight)


def counted(tokens: Tokens, kinds: Group) -> Int[Array, "b"]:
  """Real tokens of some kinds in each example."""
  ours = tokens.of_kind(kinds)
  ours = ours if tokens.mask is None else ours & tokens.mask
  return ours.sum(axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Reducer:
  """Carries out the stages of a call; holds what is the same at every stage.

  Attributes:
    stages: of every block.
    keys: one random key for each example.
    train: use the soft forms.
    ragged: examples differ in how many tokens are real.
    memory: what dropped tokens take, by block and number of the reduction.
  """

  stages: Stages
  keys: Key[Array, "b"] | None = None
  train: bool = False
  ragged: bool = False
  memory: dict[tuple[int, int], Float[Array, "b n d"]] | None = None

  @classmethod
  def create(
    cls,
    slots: Slots,
    stages: Stages,
    batch: int,
    *,
    masked: bool,
    ragged: bool,
    key: PRNGKeyArray | None,
    train: bool = False,
    memory: dict[tuple[int, int], Array] | None = None,
  ) -> "Reducer":
    """Raises ValueError where the recipe wants what the call lacks."""
    soft = train and any(r.soft is not None for r in slots.reduce)
    if key is None and (slots.needs_key or soft):
      raise ValueError(
        f"recipe {slots.name!r} is random: pass key= when applying the model"
      )
    if masked and slots.complete:
      raise ValueError(
        f"recipe {slots.name!r} works on a complete grid of tokens; it cannot"
        " take a mask"
      )
    keys = None if key is None else jax.random.split(key, batch)
    return cls(stages, keys, train, ragged, memory)

  @property
  def depth(self) -> int:
    return len(self.stages)

  def at(self, layer: int, place: str) -> tuple[Stage, ...]:
    """The stages at a place of a block."""
    return tuple(s for s in self.stages[layer] if s.reduce.at == place)

  def asked_at(self, layer: int, place: str) -> set[Question]:
    """Questions about a block that its own stages at a place ask."""
    return {
      q.answered(layer)
      for stage in self.at(layer, place)
      for q in stage.reduce.asks
      if not isinstance(q, OF_THE_CALL) and q.at(layer, self.depth) == layer
    }

  def asked_of_attention(self, layer: int) -> set[Question]:
    """Questions about a block that are asked after its input."""
    wanted = stages_lib.wanted_after(self.stages, layer, "queries", self.depth)
    return {q for q in wanted if q.about(layer, self.depth)}

  def soft(self, stage: Stage) -> bool:
    return self.train and stage.reduce.soft is not None

  def plan(
    self, stage: Stage, passage: Passage, learned: Array | None = None
  ) -> tuple[Plan, Passage]:
    """A stage's plans; counts and what rules carry on go with the passage."""
    group = group_of(stage)
    due, counts = None, passage.counts
    if self.ragged or not stage.leading:
      initial, left = passage.initial[group], counts[group]
      due = stage.due(initial, left)
      if not stage.reduce.around:
        extra = 0
        if stage.reduce.rest == "mean":
          extra = (due.left < left).astype(jnp.int32)
        counts = {**counts, group: due.left + extra}
    plan, carry = stage.plan(
      passage.tokens, self._answers(stage, passage), due=due, keys=self.keys,
      learned=learned, carry=passage.carries.get(stage.number),
    )  # fmt: skip
    carries = passage.carries
    if carry is not None:
      carries = {**carries, stage.number: carry}
    return plan, passage.replace(counts=counts, carries=carries)

  def start(self, tokens: Tokens) -> Passage:
    """The passage at the input, with the numbers of tokens of each group."""
    counts: dict[Group, Array] = {}
    for stage in (s for block in self.stages for s in block):
      group = group_of(stage)
      if group in counts or not (self.ragged or not stage.leading):
        continue
      counts[group] = counted(tokens, group)
    return Passage(tokens, counts=counts, initial=counts)

  def soften(self, stage, passage, learned=None) -> Tokens:
    """Tokens whose policies the soft form has multiplied."""
    tokens = passage.tokens
    bits = stage.soften(
      tokens, self._answers(stage, passage), keys=self.keys, learned=learned
    )
    policy = bits if tokens.policy is None else tokens.policy * bits
    return tokens.replace(policy=policy)

  def _answers(self, stage: Stage, passage: Passage) -> Answers:
    own = {q.answered(q.at(stage.layer, self.depth)) for q in stage.reduce.asks}
    return passage.answers.only(own)

  def moved(
    self, stage: Stage, plan: Plan, passage: Passage, tokens: Tokens
  ) -> Passage:
    """The passage after a plan.

    Args:
      stage: what planned.
      plan: of the batch.
      passage: before it.
      tokens: after it.
    """
    later = (plan, passage.tokens)
    away = tuple(
      dataclasses.replace(a, later=(*a.later, later)) for a in passage.away
    )
    if stage.reduce.back is not None:
      away += (Away(plan, passage, stage, stage.reduce.back),)
    wanted = stages_lib.wanted_after(
      self.stages, stage.layer, stage.reduce.at, self.depth
    )
    answers = jax.vmap(lambda a, p: a.moved(p))(
      passage.answers.only(wanted), plan
    )
    ids = passage.ids
    if ids is not None:
      ids = jax.vmap(lambda p, ids: p.take(ids))(plan, ids)
    places, gaps = passage.places, True
    if stage.reduce.unmerged:
      places = Places.of(plan, passage.tokens, passage.ids)
      gaps = passage.gaps
    passage = passage.replace(
      tokens=tokens, answers=answers, away=away, ids=ids, gaps=gaps,
      places=places,
    )  # fmt: skip
    if stage.reduce.position == "renumber":
      passage = renumbered(passage)
    return passage

  def give_back(self, passage: Passage, layer: int) -> Passage:
    """Gives back what is due behind block `layer`."""
    while self.gives_back(passage, layer):
      passage = self._returned(passage, passage.away[-1])
    return passage

  def gives_back(self, passage: Passage, layer: int) -> bool:
    """Whether something is due behind block `layer`."""
    if not passage.away:
      return False
    last = passage.away[-1]
    until = last.back.until
    ends = self.depth if until == "end" else last.stage.layer + until
    return layer + 1 >= ends

  def _returned(self, passage: Passage, away: Away) -> Passage:
    back, number = away.back, away.stage.number
    key, memory = (away.stage.layer, number), None
    if back.fill == "memory":
      none = jnp.zeros_like(away.passage.tokens.x)
      memory = (self.memory or {}).get(key, none)
    give = lambda plan, few, whole, memory: given_back(
      plan, few, back, whole, memory
    )
    before, x = away.passage, passage.tokens.x
    # What was reduced since comes back first; a memory is of all tokens only.
    inner = dataclasses.replace(back, join="replace")
    if back.fill == "memory":
      inner = dataclasses.replace(inner, fill="copy")
    for plan, tokens in away.later[::-1]:
      x = jax.vmap(lambda p, few, all_: given_back(p, few, inner, all_))(
        plan, x, tokens.x
      )
    x = jax.vmap(give)(away.plan, x, before.tokens.x, memory)
    left = passage.memory
    if back.fill == "memory":
      left = {**left, key: x}
    # `before.away` knows of the plans up to this one, which is undone now, and
    # its counts are those behind it.
    counts = {group: counted(before.tokens, group) for group in before.counts}
    return before.replace(
      tokens=before.tokens.replace(x=x), carries=passage.carries, counts=counts,
      plans=passage.plans, memory=left,
    )  # fmt: skip


class Reduces:
  """What blocks that carry out reductions share, for Linen modules.

  A block has the attribute `slots` and calls `setup_reductions` in its
  `setup`.
  """

  slots: Slots

  def setup_reductions(self) -> None:
    """Makes the modules of the reductions; those not called have no weights."""
    own = lambda module: module and module.clone(parent=None)
    self.learned = [own(reduce.learned) for reduce in self.slots.reduce]
    self.combine = [own(reduce.combine) for reduce in self.slots.reduce]

  def reduce_at(
    self, where: str, layer: int, passage: Passage, reducer: Reducer
  ) -> Passage:
    """Carries out the stages at one place of this block."""
    for stage in reducer.at(layer, where):
      learned = self.learned_of(stage, passage)
      if reducer.soft(stage):
        passage = passage.replace(
          tokens=reducer.soften(stage, passage, learned)
        )
        continue
      plan, passage = reducer.plan(stage, passage, learned)
      passage = self.move_tokens(stage, plan, passage, reducer)
    return passage

  def learned_of(self, stage: Stage, passage: Passage) -> Any:
    """What the stage's own module says."""
    if stage.reduce.learned is None:
      return None
    module = self.learned[stage.number]
    return module(passage.tokens, passage.answers, stage)

  def move_tokens(
    self, stage: Stage, plan: Plan, passage: Passage, reducer: Reducer
  ) -> Passage:
    """The passage after a plan, its features those of the stage's modules."""
    tokens = passage.tokens
    if hasattr(stage.reduce.learned, "modulate"):
      tokens = self.learned[stage.number].modulate(tokens, plan, stage)
    few = move_batch(plan, tokens)
    if stage.reduce.combine is not None:
      few = few.replace(x=self.combine[stage.number](tokens, plan, stage))
    passage = reducer.moved(stage, plan, passage, few)
    return passage.with_plan(plan)


def restore_batch(
  plan: Plan, values: Float[Array, "b m d"], back: Any
) -> Float[Array, "b n d"]:
  """`given_back`, lifted over the batch, behind a sub-layer."""
  give = lambda plan, few: given_back(plan, few, back)
  return jax.vmap(give)(plan, values)


def sequence_of_patches(
  patches: int, front: int, grid: tuple[int, ...] | None
) -> Sequence:
  """The sequence of an encoder whose protected tokens lead."""
  return Sequence(((Kind.PATCH, patches),), patches + front, front, grid)
