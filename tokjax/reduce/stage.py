"""One reduction at one block of a model, with all that is static resolved."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from tokjax import budgets, selection
from tokjax.plan import Assignment, Mixture, Plan
from tokjax.reduce import lift
from tokjax.reduce.reduction import Carried, Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Answers
from tokjax.tokens import Tokens


def same_tokens(plan: Plan, mask: Array, count: Array) -> Plan:
  """The real tokens in their order, in the form of `plan`.

  A padded batch is reduced where its longest example is; a shorter one that
  would not be reduced there alone must come out as it went in.
  """
  m, n = plan.num_outputs, plan.num_sources
  # An adaptive reduction before may have left fewer than budgets say.
  count = jnp.minimum(count, mask.sum())
  first = selection.partition(mask).index[:m]
  same = Assignment.select(first, n, jnp.arange(m) < count)
  if isinstance(plan, Mixture):
    return same.as_mixture()
  into, weight = plan.into, plan.anchor_weight
  return dataclasses.replace(
    plan,
    anchor=same.anchor,
    valid=same.valid,
    into=None if into is None else jnp.full_like(into, m),
    anchor_weight=None if weight is None else jnp.ones_like(weight),
  )


class Due(NamedTuple):
  """What examples of a padded batch may keep at a stage.

  Attributes:
    left: tokens of the reduced kinds that remain.
    free: of these, what the rule keeps; the others are protected ends.
    acts: whether the budget removes anything there.
  """

  left: Int[Array, "*b"]
  free: Int[Array, "*b"]
  acts: Bool[Array, "*b"]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One reduction at one block, with all that is static resolved.

  `plan` and `soften` act on a batch: leading axis of every array.

  Attributes:
    reduce: the reduction.
    number: its number among the model's reductions.
    keep: free tokens that remain.
    arriving, initial: free tokens at this block and at the input, at most.
    layer, depth: index of this block, number of blocks.
    protected: leading tokens that take no part.
    grid: sides of the grid that the free tokens form; None: none.
    leading: protected tokens lead the sequence; False: they are told by kind
      and place, and the rule sees every token under a mask.
    leaves: tokens of its kinds that remain, protected ends included.
    spare: room for protected tokens that do not lead.
    room: tokens that remain in all.
  """

  reduce: Reduce
  keep: int
  layer: int
  depth: int
  protected: int
  initial: int
  grid: tuple[int, ...] | None = None
  leading: bool = True
  number: int = 0
  arriving: int = -1
  leaves: int = -1
  spare: int = 0
  room: int = -1

  @property
  def outputs(self) -> int:
    """Tokens that the plan leaves, the protected included."""
    if not self.leading:
      return self.room
    return self.keep + self.protected + (self.reduce.rest == "mean")

  def due(
    self, initial: Int[Array, "*b"], arriving: Int[Array, "*b"]
  ) -> "Due":
    """What padded examples may keep.

    Args:
      initial, arriving: tokens of its kinds at the model's input and here.
    """
    budget, free = self.reduce.budget, self.reduce.free
    given, most = initial, self.initial
    if budget.of == "arriving":
      given = arriving
      most = self.arriving if self.arriving >= 0 else self.initial
    at = (self.layer, self.depth)
    count = jnp.asarray(budgets.table(budget, most, *at))[given]
    acts = (count != budgets.NOTHING) & (arriving > 0)
    ends = jnp.zeros_like(arriving)
    if not free.whole:
      of = [free.ends(n, *at) for n in range(max(most, self.initial) + 1)]
      ends = jnp.asarray(of, jnp.int32)[arriving]
    count = count + (0 if free.inside else ends)
    if budget.bound or not free.whole:
      acts = acts & (count < arriving)
    least = jnp.maximum(jnp.minimum(arriving, 1), ends)
    left = jnp.where(acts, jnp.clip(count, least, arriving), arriving)
    return Due(left, left - ends, acts)

  def plan(
    self,
    tokens: Tokens,
    answers: Answers,
    *,
    due: Due | None = None,
    keys: Key[Array, "b"] | None = None,
    learned: Array | None = None,
    carry: Any = None,
  ) -> tuple[Plan, Any]:
    """The batch's plans, and what the rule carries on.

    Args:
      tokens: `[b, n, ...]`.
      answers: to the questions of the rule.
      due: see `due`; None: nothing is padded.
      keys: a random key for each example.
      learned: what the trained module says.
      carry: from the rule's site before.
    """

    def one(tokens, answers, due, key, learned, carry):
      site = self._site(tokens, answers, due, key, learned, carry)
      found = self.reduce.rule(site)
      found = found if isinstance(found, Carried) else Carried(found, None)
      plan = found.plan
      if plan.num_outputs != self.keep:
        raise ValueError(
          f"the rule {self.reduce.rule} left {plan.num_outputs} tokens at block"
          f" {self.layer}; its budget says {self.keep}"
        )
      if due is not None:
        if plan.valid is None:
          every = jnp.ones((plan.num_outputs,), bool)
          plan = dataclasses.replace(plan, valid=every)
        same = same_tokens(plan, site.mask, due.free)
        plan = jax.tree.map(lambda a, b: jnp.where(due.acts, a, b), plan, same)
      if self.reduce.rest == "mean":
        there = jnp.ones((site.num_free,), bool)
        there = there if site.mask is None else site.mask
        plan = lift.with_mean_of_rest(plan, there, site.size)
      return Carried(self._lifted(plan, site), found.carry)

    return jax.vmap(one)(tokens, answers, due, keys, learned, carry)

  def _site(self, tokens, answers, due, key, learned, carry):
    """The site of one example."""
    if key is not None:
      key = jax.random.fold_in(key, self.layer)
      if self.number:
        key = jax.random.fold_in(key, self.number)
    free_at = None
    if not self.leading:
      free_at = self.reduce.free.places(tokens, self.layer, self.depth)
    return Site(
      tokens, answers, self.keep, self.layer, self.depth, self.protected,
      None if due is None else due.free, self.grid, key, free_at, carry,
      learned, self.reduce.budget,
    )  # fmt: skip

  def _lifted(self, plan: Plan, site: Site) -> Plan:
    if self.leading:
      return lift.leading(plan, self.protected)
    protected = ~site.free_at
    if site.tokens.mask is not None:
      protected = protected & site.tokens.mask
    return lift.anywhere(plan, protected, self.spare, self.room)

  def soften(
    self,
    tokens: Tokens,
    answers: Answers,
    *,
    keys: Key[Array, "b"] | None,
    learned: Array | None = None,
  ) -> Float[Array, "b n"]:
    """The training form: policies that multiply those of the tokens."""

    def one(tokens, answers, key, learned):
      site = self._site(tokens, answers, None, key, learned, None)
      bits = self.reduce.soft(site)
      if self.leading:
        return jnp.concatenate([jnp.ones((self.protected,)), bits])
      return jnp.where(site.free_at, bits, 1.0)

    return jax.vmap(one)(tokens, answers, keys, learned)
