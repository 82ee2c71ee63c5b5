"""PruMerge: outliers of class attention stay and absorb their neighbours."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Once
from tokjax.plan import Mixture
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Keys, Queries, asks
from tokjax.slots import Slots

PAPER = (
  "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal"
  " Models"
)
EVIDENCE = (
  "42Shawn/LLaVA-PruMerge:llava/model/multimodal_encoder/clip_encoder.py"
  " (097c041)"
)
CAPACITY = (
  "a budget bounds how many tokens an image takes, the last ones are left out"
  " beyond it; each image has its own count (the official code counts over the"
  " batch)"
)


def class_row(
  queries: Float[Array, "h n k"],
  keys: Float[Array, "h n k"],
  mask: Bool[Array, "n"] | None,
) -> Float[Array, "n"]:
  """Attention of the first token with all heads as one of the full width."""
  q, k = queries.astype(jnp.float32), keys.astype(jnp.float32)
  width = q.shape[0] * q.shape[2]
  logits = jnp.einsum("hk,hnk->n", q[:, 0], k) * width**-0.5
  if mask is not None:
    logits = jnp.where(mask, logits, -jnp.inf)
  return jax.nn.softmax(logits)


def outliers(
  score: Float[Array, "n"], mask: Bool[Array, "n"]
) -> Int[Array, ""]:
  """How many scores are above the third quartile by 1.5 times the range."""
  known = jnp.where(mask, score, jnp.nan)
  low, high = jnp.nanquantile(known, jnp.asarray([0.25, 0.75]))
  above = mask & (score > high + 1.5 * (high - low))
  return above.sum(dtype=jnp.int32)


# Its answer is not read: the first token has to be the class token.
@asks(CLASS)
def prune_and_merge(
  site: Site,
  *,
  queries: Queries,
  keys: Keys,
  neighbours: int,
  spaced: bool,
) -> Mixture:
  """Outliers, then one token of all others; each adds its neighbours.

  A neighbour adds its features times its attention, which is not normalised.
  Outliers stand in descending order, evenly spaced tokens behind them.
  """
  n, m = site.num_free, site.keep
  q, k = site.whole(queries), site.whole(keys)
  score = site.free(class_row(q, k, site.tokens.mask))
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  due = m if site.due is None else site.due
  many = jnp.clip(outliers(score, mask), 1, due - 1)
  rank = selection.places(score, mask=mask)
  kept = mask & (rank < many)
  place = jnp.cumsum(mask) - 1
  order = rank
  if spaced:
    step = jnp.maximum(mask.sum() // many // 3, 1)
    even = mask & (place % step == 0) & (place < mask.sum() - 1)
    order = jnp.where(kept, rank, n + place)
    kept = kept | even
    # Beyond the room the last ones go.
    kept = kept & (jnp.argsort(jnp.lexsort((order, ~kept))) < due - 1)
  index, real = selection.of_mask(kept, m - 1, order=order)
  left = mask & ~kept
  # Where nothing is left the extra token is padding, as are unused places.
  valid = jnp.append(real, left.any())
  anchor = jnp.append(index, jnp.argmax(left))
  metric = site[keys].astype(jnp.float32)
  metric = jnp.moveaxis(metric, 0, 1).reshape(n, -1)
  similar = scores.cosine(metric[index], metric)
  weight = with_neighbours(similar, score, index, mask, neighbours)
  weight = jnp.concatenate([weight, jnp.where(left, score, 0.0)[None]])
  own = jnp.arange(n)[None] == index[:, None]
  share = jnp.concatenate([own, left[None]]) & valid[:, None]
  share = share.astype(jnp.float32)
  weight = jnp.where(valid[:, None], weight, 0.0)
  return Mixture(weight, share, share.T, anchor, valid)


def with_neighbours(
  similar: Float[Array, "m n"],
  score: Float[Array, "n"],
  index: Int[Array, "m"],
  among: Bool[Array, "n"],
  neighbours: int,
) -> Float[Array, "m n"]:
  """Weights of some tokens and of those nearest to each, by their scores.

  Args:
    similar: of the tokens at `index` to all.
    score: what a neighbour is multiplied with; a token itself counts once.
    index: of the tokens.
    among: which tokens may be neighbours of others.
    neighbours: how many there are, at most.
  """
  n = similar.shape[1]
  itself = jnp.arange(n)[None] == index[:, None]
  similar = jnp.where(among[None] & ~itself, similar, -jnp.inf)
  near = selection.top_indices(similar, min(neighbours, n - 1))
  rows = jnp.arange(len(index))[:, None]
  add = jnp.where(similar[rows, near] > -jnp.inf, score[near], 0.0)
  return itself.astype(jnp.float32).at[rows, near].add(add)


def _slots(budget: Budget, spaced: bool) -> Slots:
  rule = bind(
    prune_and_merge, queries=Queries(), keys=Keys(), neighbours=32,
    spaced=spaced,
  )  # fmt: skip
  return Slots(Reduce(rule, budget)).within("ahead")


@recipe(
  "prumerge",
  family="vlm",
  paper=PAPER,
  arxiv="2403.15388",
  code="42Shawn/LLaVA-PruMerge",
  evidence=EVIDENCE,
  deviations=CAPACITY,
)
def prumerge(budget: Budget = Once(0.125)) -> Slots:
  """As many tokens as there are outliers in class attention, and one more.

  The block ahead of the features is asked, with all heads as one.
  """
  return _slots(budget, False)


@recipe(
  "prumerge_plus",
  family="vlm",
  paper=PAPER,
  arxiv="2403.15388",
  code="42Shawn/LLaVA-PruMerge",
  evidence=EVIDENCE,
  deviations=f"{CAPACITY}; spaced tokens stand at least one apart (the official"
  " step can be 0)",
)
def prumerge_plus(budget: Budget = Once(0.25)) -> Slots:
  """With evenly spaced tokens next to the outliers."""
  return _slots(budget, True)
