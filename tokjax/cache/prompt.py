"""Prompts shortened after an early layer: the `prompt` slot.

See `tokjax.cache.contract.PromptSelect` for what a model does with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import schedules, selection
from tokjax.cache import budgets
from tokjax.cache import scores as importance
from tokjax.cache.budgets import Budget
from tokjax.cache.contract import Arrivals, Layer
from tokjax.plan import Assignment


@dataclasses.dataclass(frozen=True)
class LastQuery:
  """Keeps the tokens whose keys fit the last token's query at one layer.

  Products are summed over query heads (neither scale nor softmax changes the
  ranking of sums) and averaged over neighbours.

  Attributes:
    layer: the layer that is looked at, or a fraction of the depth.
    budget: how many tokens remain (the last one counts extra, if it is kept).
    kernel: of the average, odd.
    keep_last: whether the last token stays in any case and takes no part.
    restart: whether the kept ids are run anew (GemFilter), or the hidden
      states go on (PromptDistill).
  """

  layer: int | float
  budget: Budget
  kernel: int = 5
  keep_last: bool = False
  restart: bool = True

  def at(self, depth: int) -> int:
    return schedules.block(self.layer, depth)

  def with_keep(self, keep: float) -> "LastQuery":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def count(self, prompt: int) -> int:
    """Places of the kept tokens, for prompts padded to that length."""
    table = budgets.table(self.budget, prompt, 0, 1)
    return min(int(table.max()) + self.keep_last, prompt)

  def score(
    self,
    layer: Layer,
    q: Float[Array, "t h d"],
    k: Float[Array, "t g d"],
    valid: Bool[Array, "t"],
  ) -> Float[Array, "t"]:
    """One example's scores from rotated queries and keys."""
    end = valid.sum() - 1
    last = q[jnp.maximum(end, 0)].reshape(layer.kv_heads, layer.group, -1)
    score = jnp.einsum("grd,tgd->t", last, k)
    place = jnp.arange(valid.shape[0])
    free = valid & ((place < end) | (not self.keep_last))
    return importance.pool(jnp.where(free, score, 0.0), self.kernel, "avg")

  def plan(self, layer: Layer, arrivals: Arrivals) -> Assignment:
    """The batch's plans `[b, m]`; lift its methods with `jax.vmap`."""
    a = arrivals.clean()
    n = a.valid.shape[1]
    room = self.count(n)
    counts = jnp.asarray(budgets.table(self.budget, n, 0, 1))
    q, k = (layer.rotate(x, a.position) for x in (a.q, a.k))

    def one(q, k, valid):
      length = valid.sum()
      score = self.score(layer, q, k, valid)
      end = (jnp.arange(n) == length - 1) & self.keep_last
      count = counts[length] + self.keep_last
      pick = selection.in_order(
        selection.top_k(
          jnp.where(end, jnp.inf, score), room, mask=valid, count=count
        )
      )
      return Assignment.select(pick.index, n, pick.valid)

    return jax.vmap(one)(q, k, a.valid)
