"""One reduction at one block of a model, with all that is static resolved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from tokjax.plan import Assignment, Mixture, Plan
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.schedules import Schedule
from tokjax.tokens import Signals, Tokens


@functools.cache
def count_table(schedule: Schedule, tokens: int, depth: int) -> np.ndarray:
  """Counts for every number of real tokens up to `tokens`, `[tokens+1, depth]`.

  A padded example keeps as many tokens as it would alone: an exact look-up
  instead of arithmetic on traced numbers.
  """
  table = np.zeros((tokens + 1, depth), np.int32)
  for real in range(1, tokens + 1):
    left = real
    for layer, after in enumerate(schedule.counts(real, depth)):
      left = left if after is None else max(min(after, left), 1)
      table[real, layer] = left
  return table


@functools.cache
def act_table(schedule: Schedule, tokens: int, depth: int) -> np.ndarray:
  """Whether a schedule acts, `[tokens+1, depth]`; see `count_table`."""
  acts = np.zeros((tokens + 1, depth), bool)
  for real in range(1, tokens + 1):
    acts[real] = [after is not None for after in schedule.counts(real, depth)]
  return acts


def _or_same(acts: Array, plan: Plan, site: Site) -> Plan:
  """`plan`, or where it does not act the real tokens in their order.

  A padded batch is reduced where its longest example is; a shorter one that
  would not be reduced there alone must come out as it went in.
  """
  m, n = plan.num_outputs, plan.num_sources
  first = jnp.argsort(~site.mask, stable=True)[:m]
  same = Assignment.select(first, n, jnp.arange(m) < site.count)
  if plan.valid is None:
    plan = dataclasses.replace(plan, valid=jnp.ones((m,), bool))
  if isinstance(plan, Mixture):
    same = same.as_mixture()
  else:
    into, weight = plan.into, plan.anchor_weight
    same = dataclasses.replace(
      plan,
      anchor=same.anchor,
      valid=same.valid,
      into=None if into is None else jnp.full_like(into, m),
      anchor_weight=None if weight is None else jnp.ones_like(weight),
    )
  return jax.tree.map(lambda a, b: jnp.where(acts, a, b), plan, same)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One reduction at one block, with all that is static resolved.

  `plan` and `move` act on a batch: leading axis of every array.
  """

  reduce: Reduce
  keep: int
  layer: int
  depth: int
  protected: int
  initial: int
  grid: tuple[int, int] | None = None
  leading: bool = True

  def plan(
    self,
    tokens: Tokens,
    signals: Signals,
    *,
    real: Int[Array, "b"] | None = None,
    keys: Key[Array, "b"] | None = None,
  ) -> Plan:
    """The batch's plans.

    Args:
      tokens: `[b, n, ...]`.
      signals: those the rule needs.
      real: how many free tokens each example had at the model's input, when
        it is padded.
      keys: a random key for each example.
    """
    table = acts = None
    if real is not None:
      of = (self.reduce.schedule, self.initial, self.depth)
      table, acts = map(jnp.asarray, (count_table(*of), act_table(*of)))

    def one(tokens, signals, real, key):
      order = None
      if not self.leading:
        order = jnp.argsort(~tokens.of_kind(), stable=True)
      if key is not None:
        key = jax.random.fold_in(key, self.layer)
      count = None if real is None else table[real, self.layer]
      site = Site(
        tokens, signals, self.keep, self.layer, self.depth, self.protected,
        count, self.grid, key, order,
      )  # fmt: skip
      plan = self.reduce.rule(site)
      if real is not None:
        plan = _or_same(acts[real, self.layer], plan, site)
      return site.lift(plan)

    plan = jax.vmap(one)(tokens, signals, real, keys)
    expected = self.keep + self.protected
    if plan.num_outputs != expected:
      raise ValueError(
        f"the rule {self.reduce.rule} left {plan.num_outputs} tokens at block"
        f" {self.layer}; its schedule says {expected}"
      )
    return plan

  def soften(
    self, tokens: Tokens, signals: Signals, *, keys: Key[Array, "b"] | None
  ) -> Tokens:
    """The training form: multiplies policies instead of removing tokens."""
    p = self.protected

    def one(tokens, signals, key):
      if key is not None:
        key = jax.random.fold_in(key, self.layer)
      site = Site(
        tokens, signals, self.keep, self.layer, self.depth, p, None, self.grid,
        key,
      )  # fmt: skip
      return jnp.concatenate([jnp.ones((p,)), self.reduce.soft(site)])

    bits = jax.vmap(one)(tokens, signals, keys)
    policy = bits if tokens.policy is None else tokens.policy * bits
    return tokens.replace(policy=policy)
