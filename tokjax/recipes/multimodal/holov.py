"""HoloV: every part of an image keeps its share of tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import AtEnd, Budget, Count
from tokjax.plan import Assignment, Plan
from tokjax.recipes.multimodal.encoder import CLASS_MEAN
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Rows
from tokjax.slots import Slots

# Against a division by zero, as in the official code.
TINY = 1e-6


def chunk_of(mask: Bool[Array, "n"], chunks: int) -> Int[Array, "n"]:
  """The chunk of each token: equal parts in a row, the first ones larger."""
  place = jnp.cumsum(mask) - 1
  size, larger = mask.sum() // chunks, mask.sum() % chunks
  edge = larger * (size + 1)
  behind = larger + (place - edge) // jnp.maximum(size, 1)
  return jnp.where(place < edge, place // (size + 1), behind)


def context(
  x: Float[Array, "n d"],
  attention: Float[Array, "n"],
  same: Bool[Array, "n n"],
  *,
  weight: float,
) -> Float[Array, "n"]:
  """Attention and the variance of cosines within a chunk, on one scale.

  Args:
    x: features.
    attention: of the class token.
    same: which tokens are in one chunk.
    weight: of the variance.
  """
  size = same.sum(axis=1)
  others = jnp.maximum(size - 1, 1)
  pair = same & ~jnp.eye(len(x), dtype=bool)
  cosine = jnp.where(pair, scores.cosine(x, x), 0.0)
  mean = cosine.sum(axis=1) / others
  apart = jnp.where(same, jnp.square(cosine - mean[:, None]), 0.0)
  variance = apart.sum(axis=1) / others
  scaled = 1000 * attention
  of_chunk = lambda v: jnp.where(same, v[None], 0.0).sum(axis=1) / jnp.maximum(
    size, 1
  )
  scale = of_chunk(scaled) / (of_chunk(variance) + TINY)
  return jnp.where(size > 1, scaled + weight * scale * variance, attention)


def share_out(
  site: Site, *, score: Rows, chunks: int, weight: float
) -> Plan:
  """Chunks with much attention and variety get more; the best of each stay.

  What rounding leaves goes to the heaviest chunks, one token each. A chunk
  that gets more than it has leaves the others as they are.
  """
  n = site.num_free
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  due = site.keep if site.due is None else site.due
  attention = jnp.where(mask, site[score].astype(jnp.float32), 0.0)
  chunk = chunk_of(mask, chunks)
  member = (chunk[None] == jnp.arange(chunks)[:, None]) & mask[None]
  size = member.sum(axis=1)
  same = (chunk[:, None] == chunk[None]) & mask[:, None] & mask[None]
  value = context(site.x.astype(jnp.float32), attention, same, weight=weight)
  total = jnp.where(member, value[None], 0.0).sum(axis=1)
  heavy = total / jnp.maximum(size, 1)
  heavy = heavy / (heavy.sum() + TINY)
  quota = jnp.floor(heavy * due).astype(jnp.int32)
  left = due - quota.sum()
  quota += selection.places(heavy, mask=size > 0) < jnp.minimum(left, chunks)
  quota = jnp.where(size > 0, quota, 0)
  place = jnp.arange(n)
  own, other = attention[:, None], attention[None]
  tied = (other == own) & (place[None] < place[:, None])
  rank = (same & ((other > own) | tied)).sum(axis=1)
  at = jnp.clip(chunk, 0, chunks - 1)
  whole = quota[at] >= size[at]
  order = chunk * 2 * n + jnp.where(whole, place, rank)
  chosen = mask & (rank < quota[at])
  index, valid = selection.of_mask(chosen, site.keep, order=order)
  return Assignment.select(index, n, valid)


@recipe(
  "holov",
  family="vlm",
  paper="Don't Just Chase \"Highlighted Tokens\" in MLLMs: Revisiting Visual"
  " Holistic Context Retention",
  arxiv="2510.02912",
  code="obananas/HoloV",
  evidence="obananas/HoloV:llava/model/utils.py (1d2e65e), run next to this on"
  " the same arrays",
  deviations="features are those before the projector, where class attention is"
  " known (there projected ones), which matters for how many tokens a chunk"
  " gets; a chunk that gets more tokens than it has leaves room that is padding"
  " (there vectors of zeros)",
)
def holov(
  chunks: int = 16, weight: float = 0.09, budget: Budget = Count(64)
) -> Slots:
  """Parts of the image share out what remains; class attention picks in each.

  Args:
    chunks: how many parts of tokens in a row.
    weight: of the variance of cosines against attention, in a part's share.
    budget: how many patches remain.
  """
  if chunks < 1 or not weight >= 0:
    raise ValueError(
      f"chunks={chunks}, weight={weight}: must be 1 or more, and 0 or more"
    )
  rule = bind(share_out, score=CLASS_MEAN, chunks=chunks, weight=weight)
  return Slots(Reduce(rule, AtEnd(budget), at="output")).within("vision")
