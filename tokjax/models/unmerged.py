"""Virtual unmerging: attention sees every place, all else only the outputs.

A reduction that says `unmerged` makes some tokens one. In every attention after
it the members stand at their places again, each with the query, key and value
of the output that they went into; their outputs are averaged (DyMU, Wang et
al., 2025, checked against MikeWangWZHL/dymu:LLaVA/llava/model/language_model/
llava_llama_w_exact_vtu_attn.py, c57d75a).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.plan import Plan
from tokjax.tokens import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
  """Where the members of outputs stand.

  Attributes:
    owner: the output that each place belongs to; the number of outputs where
      there is none, as in padding, `[b, n]`.
    position, mask, ids: of the places, see `Passage`.
  """

  owner: Int[Array, "b n"]
  position: Float[Array, "b n p"]
  mask: Bool[Array, "b n"]
  ids: Int[Array, "b n"] | None

  @classmethod
  def of(
    cls, plan: Plan, tokens: Tokens, ids: Int[Array, "b n"] | None
  ) -> "Places":
    """Those of a reduction's plans.

    Args:
      plan: of the batch.
      tokens, ids: before it.
    """
    owner = jax.vmap(lambda plan: plan.index)(plan)
    mask: Any = tokens.mask  # A decoder's tokens always have one.
    real = mask & (owner < plan.num_outputs)
    return cls(owner, tokens.position, real, ids)


def spread(
  x: Float[Array, "b m *f"], owner: Int[Array, "b n"]
) -> Float[Array, "b n *f"]:
  """What each place has of its output."""
  take = lambda x, owner: x.at[owner].get(mode="fill", fill_value=0)
  return jax.vmap(take)(x, owner)


def gathered(
  y: Float[Array, "b n *f"],
  owner: Int[Array, "b n"],
  real: Bool[Array, "b n"],
  outputs: int,
) -> Float[Array, "b m *f"]:
  """Means over the places of each output; zeros where it has none."""

  def one(y, owner, real):
    to = jnp.where(real, owner, outputs)
    count = jnp.zeros((outputs,), jnp.float32).at[to].add(1.0, mode="drop")
    weight = 1 / jnp.maximum(count, 1.0)
    total = jnp.zeros((outputs, *y.shape[1:]), jnp.float32)
    total = total.at[to].add(y.astype(jnp.float32), mode="drop")
    weight = weight.reshape((-1,) + (1,) * (y.ndim - 1))
    return (total * weight).astype(y.dtype)

  return jax.vmap(one)(y, owner, real)
