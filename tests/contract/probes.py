"""What a plan says of itself, computed inside the program that made it."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.plan import Plan


def fixed(seed: int, *shape: int) -> jax.Array:
  """The same random values for every call, to be sent through a plan."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def probe(plan: Plan) -> dict[str, jax.Array]:
  """A batch of plans, asked for all that the laws compare."""

  def one(plan):
    m, n = plan.num_outputs, plan.num_sources
    dense = plan.as_mixture()
    valid = jnp.ones((m,), bool) if plan.valid is None else plan.valid
    return {
      "matrix": plan.matrix(),
      "share": dense.share,
      "back": dense.back,
      "applied": plan.apply(fixed(0, n, 3)),
      "restored": plan.restore(fixed(1, m, 3)),
      "total": plan.total(jnp.abs(fixed(2, n))),
      "dropped": plan.dropped,
      "anchor": plan.anchor,
      "valid": valid,
    }

  return jax.vmap(one)(plan)


def shares(plan: Plan) -> tuple[jax.Array, jax.Array]:
  """Which part of each source's size arrives, and whether any is to, `[n]`."""
  return plan.as_mixture().share.sum(axis=0), ~plan.dropped


def compose(plans: list[Plan]) -> jax.Array:
  """The matrix of all plans in a row, composed by `then`, `[b, m, n]`."""

  def one(plans):
    whole = plans[0]
    for plan in plans[1:]:
      whole = whole.then(plan)
    return whole.matrix()

  return jax.vmap(one)(plans)
