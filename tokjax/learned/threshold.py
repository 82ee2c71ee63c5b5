"""DyMU's thresholds: how similar tokens have to be to become one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import matching, scores
from tokjax.budgets import Even
from tokjax.reduce.stage import Stage
from tokjax.signals import Answers, Keys
from tokjax.tokens import Tokens


def first_not_taken(
  best: Float[Array, "b a"], many: int
) -> Float[Array, ""]:
  """The similarity of the best edge of a batch behind the `many` best.

  At least 0. Edges that cannot merge are minus infinity and count as edges.
  """
  ordered = jnp.sort(best.reshape(-1), descending=True)
  return jnp.maximum(ordered[min(many, ordered.shape[0] - 1)], 0.0)


class Threshold(nn.Module):
  """A threshold of similarity for each block, the mean of those of batches.

  Where losses are collected, in training, a batch has the threshold that merges
  as many tokens as `average` says, in all of its images together: many in plain
  images, few in others. The parameter learns the mean of these by squares; it
  is what is used otherwise.

  Attributes:
    average: fraction of the tokens that remains at the end, on average.
  """

  average: float

  @nn.compact
  def __call__(
    self, tokens: Tokens, answers: Answers, stage: Stage
  ) -> Float[Array, "b"]:
    b = len(tokens.x)
    # As published: nothing merges unless it was calibrated.
    mean = self.param("threshold", nn.initializers.ones, ())
    if not self.is_mutable_collection("losses"):
      return jnp.full((b,), mean)
    keys = answers[Keys().answered(stage.layer)]
    best = best_edges(tokens, keys, stage.protected)
    budget, at = Even(self.average), stage.layer
    left = budget.counts(stage.initial, stage.depth)[: at + 1]
    before = [n for n in left[:-1] if n is not None] or [stage.initial]
    due = before[-1] if left[-1] is None else left[-1]
    found = first_not_taken(best, b * (before[-1] - due))
    found = jax.lax.stop_gradient(found)
    gap = jnp.square(mean - found) / 2
    self.sow("losses", "threshold", gap, reduce_fn=lambda _, new: new)
    return jnp.full((b,), found)


def best_edges(
  tokens: Tokens, keys: Float[Array, "b h n k"], protected: int
) -> Float[Array, "b a"]:
  """The similarity of every source's best target; -inf where there is none.

  The class token is a source that never merges, as in the official code.
  """

  def one(keys, mask):
    unit = scores.normalise(keys.mean(axis=0))
    sides = matching.parity(len(unit), mask=mask)
    free = jnp.arange(len(unit)) >= protected
    free = free if mask is None else free & mask
    edge = unit[sides.source] @ unit[sides.target].T
    return matching.best_edges(edge, sides, free)[0]

  return jax.vmap(one)(keys, tokens.mask)
