"""How visual tokens that go leave something of themselves: shared combiners."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import scores, selection
from tokjax.plan import Assignment
from tokjax.selection import Selection


def strided(
  among: Bool[Array, "n"], k: int, count: Int[Array, ""] | int
) -> Selection:
  """The 1st, (1 + s)th, (1 + 2s)th, ... of some tokens, s = floor(all / count).

  Args:
    among: which tokens.
    k: room (static).
    count: how many, at most k.
  """
  rank = jnp.cumsum(among) - 1
  step = jnp.maximum(among.sum() // jnp.maximum(count, 1), 1)
  chosen = among & (rank % step == 0) & (rank // step < count)
  return selection.of_mask(chosen, k)


def most_similar(
  metric: Float[Array, "n d"], targets: Selection
) -> Int[Array, "n"]:
  """The target with the largest cosine to each token, by its index.

  n (no token) where there are no targets.
  """
  n = metric.shape[0]
  if not targets.index.shape[0]:
    return jnp.full((n,), n, jnp.int32)
  cosine = scores.cosine(metric, metric[targets.index])
  if targets.valid is not None:
    cosine = jnp.where(targets.valid[None], cosine, -jnp.inf)
  best = targets.index[jnp.argmax(cosine, axis=1)].astype(jnp.int32)
  if targets.valid is None:
    return best
  return jnp.where(targets.valid.any(), best, n)


def target_plus_mean(plan: Assignment) -> Assignment:
  """The plan whose outputs are the anchor plus the mean of those that joined.

  VisionZip and VisionDrop: a sum, not an average, so that a target with
  members is about twice as long as one without.
  """
  m = plan.num_outputs
  if plan.rest is None:
    return plan
  joined = plan.into < m
  members = jnp.zeros((m + 1,)).at[plan.into].add(joined)
  weight = jnp.where(joined, 1.0 / jnp.maximum(members[plan.into], 1.0), 0.0)
  return dataclasses.replace(
    plan, anchor_weight=jnp.ones((m,), jnp.float32), rest_weight=weight
  )


def with_mean_of_rest(
  best: Bool[Array, "n"], rest: Bool[Array, "n"], keep: int
) -> Assignment:
  """Keeps the best in their order; behind them stands the mean of the rest.

  Args:
    best, rest: of the real tokens; without rest there is no mean.
    keep: room (static), for the mean too.
  """
  n = best.shape[0]
  place, first = jnp.arange(n), jnp.argmax(rest)
  parent = jnp.where(best, place, jnp.where(rest, first, n))
  plan = Assignment.from_parent(
    parent, keep, order=jnp.where(best, place, n), mask=best | rest,
    full=False, exact=False,
  )  # fmt: skip
  return plan.weighted(jnp.ones((n,), jnp.float32))
