"""One example's prompt at a layer, as scores of cache entries see it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.cache.workspace import Workspace
from tokjax.layer import Layer


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One example's prompt, as scorers see it.

  Attributes:
    layer: static facts.
    q: last queries before rotation, as many as the method asked for, newest
      at the end where it asked for a window, `[w, H, D]`.
    q_position, q_valid: of those, `[w]`.
    k, v: before rotation, `[n, G, D]`.
    position, valid: of keys, `[n]`.
    token: ids, `[n]`, where asked for.
    lse: log-sum-exps of the logits of the prompt's queries, `[H, n]`, where
      attention left them.
    gaps: as in `Arrivals` (static).
  """

  layer: Layer
  q: Float[Array, "w h d"]
  q_position: Int[Array, "w"]
  q_valid: Bool[Array, "w"]
  k: Float[Array, "n g d"]
  v: Float[Array, "n g d"]
  position: Int[Array, "n"]
  valid: Bool[Array, "n"]
  token: Int[Array, "n"] | None
  lse: Float[Array, "h n"] | None = None
  gaps: bool = False

  @property
  def rotated_q(self) -> Float[Array, "w h d"]:
    return self.layer.rotate(self.q, self.q_position)

  @property
  def rotated_k(self) -> Float[Array, "n g d"]:
    return self.layer.rotate(self.k, self.position)

  @property
  def length(self) -> Int[Array, ""]:
    return self.valid.sum(dtype=jnp.int32)


Scorer = Callable[[Prompt], Array]


def over_prompts(
  layer: Layer, space: Workspace, fn: Callable[..., Any], *more: Array
) -> Any:
  """`fn` of every example's prompt, and of its part of `more`."""

  def one(q, q_position, q_valid, m, lse, *more):
    prompt = Prompt(
      layer, q, q_position, q_valid, m.k, m.v, m.position, m.valid, m.token,
      lse, space.gaps,
    )  # fmt: skip
    return fn(prompt, *more)

  of = (space.q, space.q_position, space.q_valid, space.memory, space.lse)
  return jax.vmap(one)(*of, *more)
