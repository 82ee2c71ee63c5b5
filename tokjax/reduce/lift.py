"""Plans over free tokens as plans over all tokens.

Protected tokens are set aside before a rule and put back after it, here and
nowhere else. Where the protected tokens lead the sequence, that is a slice
(`leading`); elsewhere the rule sees every place and a mask (`anywhere`).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from tokjax.plan import Assignment, Mixture, Plan
from tokjax.reduce.free import first_places


def leading(plan: Plan, p: int) -> Plan:
  """A plan over the tokens behind `p` protected ones, as one over all."""
  if p == 0:
    return plan
  if isinstance(plan, Mixture):
    return _leading_mixture(plan, p)

  def extend(values, head):
    if values is None:
      return None
    return jnp.concatenate([jnp.full((p,), head, values.dtype), values])

  return Assignment(
    anchor=jnp.concatenate([jnp.arange(p), plan.anchor + p]),
    rest=None if plan.rest is None else plan.rest + p,
    into=None if plan.into is None else plan.into + p,
    valid=extend(plan.valid, True),
    anchor_weight=extend(plan.anchor_weight, 1.0),
    rest_weight=plan.rest_weight,
    num_sources=plan.num_sources + p,
  )


def _leading_mixture(plan: Mixture, p: int) -> Mixture:
  def extend(matrix):
    m, n = matrix.shape
    corner = jnp.zeros((m + p, n + p)).at[:p, :p].set(jnp.eye(p))
    return corner.at[p:, p:].set(matrix)

  valid = plan.valid
  if valid is not None:
    valid = jnp.concatenate([jnp.ones((p,), bool), valid])
  return Mixture(
    extend(plan.weight),
    extend(plan.share),
    extend(plan.back),
    jnp.concatenate([jnp.arange(p), plan.anchor + p]),
    valid,
  )


def anywhere(
  plan: Plan, protected: Bool[Array, "n"], spare: int, room: int
) -> Plan:
  """A plan whose outputs are the free ones, with the protected ones added.

  Outputs stand at the places of their anchors; free outputs take the free
  ones of these places in the order that the rule gave them. Those that are
  padding come last.

  Args:
    plan: over all places; protected ones take no part.
    protected: which tokens stay as they are.
    spare: room for protected ones (static).
    room: outputs in all (static), at least as many as are real.
  """
  n, keep = plan.num_sources, plan.num_outputs
  index, real = first_places(protected, spare)
  valid = jnp.ones((keep,), bool) if plan.valid is None else plan.valid
  # Free outputs in the rule's order take the places of their anchors.
  place = jnp.sort(jnp.where(valid, plan.anchor, n))
  rank = jnp.cumsum(valid) - 1
  place = jnp.where(valid, place[jnp.maximum(rank, 0)], n)
  order = jnp.concatenate([jnp.where(real, index, n), place])
  perm = jnp.argsort(order, stable=True)[:room]
  both = lambda a, b: jnp.concatenate([a, b])[perm]
  anchor = both(index, plan.anchor.astype(index.dtype))
  now_valid = both(real, valid)
  if isinstance(plan, Mixture):
    return _with_rows(plan, index, perm, anchor, now_valid)
  weight = plan.anchor_weight
  if weight is not None:
    weight = both(jnp.ones((spare,), weight.dtype), weight)
  into = plan.into
  if into is not None:
    # Where each free output went; those that joined nothing stay dropped.
    went = jnp.full((spare + keep,), room, jnp.int32)
    went = went.at[perm].set(jnp.arange(room, dtype=jnp.int32))[spare:]
    into = jnp.append(went, room)[jnp.minimum(into, keep)]
  return dataclasses.replace(
    plan, anchor=anchor, into=into, valid=now_valid, anchor_weight=weight
  )


def _with_rows(plan: Mixture, index, perm, anchor, valid) -> Mixture:
  n = plan.num_sources
  own = (jnp.arange(n)[None] == index[:, None]).astype(plan.weight.dtype)
  rows = lambda matrix: jnp.concatenate([own, matrix])[perm]
  keep_real = lambda matrix: jnp.where(valid[:, None], matrix, 0.0)
  return Mixture(
    keep_real(rows(plan.weight)),
    keep_real(rows(plan.share)),
    keep_real(rows(plan.back.T)).T,
    anchor,
    valid,
  )


def with_mean_of_rest(
  plan: Assignment, free: Bool[Array, "n"], size: Array
) -> Assignment:
  """One output more: the mean, by size, of the free tokens that are dropped.

  It stands where the first of them stood; it is padding where none is.
  """
  n = plan.num_sources
  place = jnp.arange(n)
  gone = free & plan.dropped
  anchor = jnp.argmax(gone)
  valid = plan.valid
  anchors = plan.anchor
  if valid is not None:
    anchors = jnp.where(valid, anchors, n)
  stays = jnp.zeros((n,), bool).at[anchors].set(True, mode="drop")
  parent = jnp.where(stays, place, jnp.where(gone, anchor, n))
  m = min(plan.num_outputs + 1, n)
  merged = Assignment.from_parent(
    parent, m, mask=stays | gone, full=False, exact=False
  )
  return merged.weighted(size)
