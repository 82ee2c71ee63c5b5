"""What an encoder needs to carry out the reductions of its slots."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from tokjax.plan import Plan
from tokjax.reduce.reduction import Slots
from tokjax.reduce.stage import Stage
from tokjax.tokens import Signals, Tokens


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


def restore_batch(
  plan: Plan, values: Float[Array, "b m d"]
) -> Float[Array, "b n d"]:
  """`plan.restore`, lifted over the batch."""
  return jax.vmap(lambda p, v: p.restore(v))(plan, values)


def build_stages(
  slots: Slots, free: int, depth: int, protected: int, grid: tuple[int, int]
) -> list[tuple[Stage, ...]]:
  """The reductions of every block, with static counts, checked."""
  stages: list[list[Stage]] = [[] for _ in range(depth)]
  for reduce, counts in zip(
    slots.reduce, slots.counts(free, depth), strict=True
  ):
    left = free
    for layer, after in enumerate(counts):
      whole = grid if left == free or reduce.at == "around_attention" else None
      if after is None:
        continue
      if after == left and reduce.at == "around_attention":
        continue  # all attend, and all are given back: nothing to do
      stages[layer].append(
        Stage(reduce, after, layer, depth, protected, free, whole)
      )
      if reduce.at != "around_attention":
        left = after
  return [tuple(s) for s in stages]


def needs_of_block(slots: Slots, stages, i: int) -> tuple[str, ...]:
  """Signals block i has to give: to its own stages and to the next block's."""
  here = [s.reduce for s in stages[i] if s.reduce.at != "before_block"]
  later = stages[i + 1] if i + 1 < len(stages) else ()
  here += [s.reduce for s in later if s.reduce.at == "before_block"]
  names = {name for r in here for name in r.needs} | set(slots.collect)
  if any(r.at == "attention_map" for r in here):
    names.add("attention")
  return tuple(sorted(names))


@dataclasses.dataclass(frozen=True)
class Reducer:
  """Makes the plans of a pass; holds what is the same at every stage.

  Attributes:
    real: free tokens each example had at the input, when it is padded.
    keys: one random key for each example.
    train: use the soft forms.
  """

  real: Int[Array, "b"] | None
  keys: Key[Array, "b"] | None
  train: bool

  @classmethod
  def create(
    cls,
    slots: Slots,
    mask: Bool[Array, "b n"] | None,
    batch: int,
    protected: int,
    key: PRNGKeyArray | None,
    train: bool,
  ) -> "Reducer":
    """Raises ValueError where the recipe wants what the call lacks."""
    needs = {name for r in slots.reduce for name in r.needs}
    soft = train and any(r.soft is not None for r in slots.reduce)
    if key is None and ("key" in needs or soft):
      raise ValueError(
        f"recipe {slots.name!r} is random: pass key= when applying the model"
      )
    real = None
    if mask is not None:
      if slots.complete:
        raise ValueError(
          f"recipe {slots.name!r} works on a complete grid of tokens; it cannot"
          " take a mask"
        )
      real = mask[:, protected:].sum(axis=1)
    keys = None if key is None else jax.random.split(key, batch)
    return cls(real, keys, train)

  def __call__(self, stage: Stage, tokens: Tokens, signals: Signals) -> Plan:
    return stage.plan(tokens, signals, real=self.real, keys=self.keys)

  def soft(self, stage: Stage) -> bool:
    return self.train and stage.reduce.soft is not None

  def soften(self, stage: Stage, tokens: Tokens, signals: Signals) -> Tokens:
    return stage.soften(tokens, signals, keys=self.keys)


def restore_all(
  tokens: Tokens, plans: list[list[Plan]], start: int, whole: Tokens
) -> Tokens:
  """Gives the tokens that entered block `start` the values of their outputs."""
  x = tokens.x
  for plan in [p for made in plans[start:] for p in made][::-1]:
    x = restore_batch(plan, x)
  return whole.replace(x=x)
