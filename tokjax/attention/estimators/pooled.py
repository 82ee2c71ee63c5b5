"""Estimates from a summary of each block of keys: a mean, bounds, one key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.attention import bounds
from tokjax.attention.estimators import blocks
from tokjax.attention.estimators.blocks import Blocked


def mean_pooled(given: Blocked) -> Float[Array, "h i j"]:
  """Mean query against mean key of each pair of blocks.

  What VSA (arXiv 2505.13389) pools and, with single queries, MoBA (arXiv
  2502.13189). A block counts as many keys as it has, weighted by `exp(bias)`.
  Cost: 1 / (block_q block_k) of the attention scores.
  """
  block_q, block_k = given.block_q, given.block_k
  q = _mean(blocks.cut(given.q, block_q), given.asked(block_q))
  k = _mean(blocks.cut(given.k, block_k), given.there(block_k))
  logits = _products(q, blocks.repeat(k, q.shape[0]))
  own = given.key_logits(block_k)
  return logits + blocks.log_sum(own)[None, None, :]


def bound(given: Blocked) -> Float[Array, "h i j"]:
  """The largest logit that a block can hold, by its keys' minima and maxima.

  Quest's bound (see `tokjax.attention.bounds`). Quest asks it for a single new
  query; here a block of queries takes the largest of theirs, which still
  bounds every logit of the block. Cost: 2 / block_k of the scores.
  """
  block_q, block_k = given.block_q, given.block_k
  heads, m, _ = given.q.shape
  cells = blocks.cut(given.k, block_k)
  low, high = (
    blocks.repeat(x, heads)
    for x in bounds.extremes(cells, given.there(block_k)[None])
  )
  q = given.q.astype(jnp.float32)
  limit = jax.vmap(bounds.largest_products)(q, low, high)
  limit = limit * given.q.shape[-1] ** -0.5
  limit = jnp.pad(limit, ((0, 0), (0, -m % block_q), (0, 0)))
  limit = limit.reshape(heads, -1, block_q, limit.shape[-1])
  asked = given.asked(block_q)
  limit = jnp.where(asked[None, :, :, None], limit, -jnp.inf).max(axis=2)
  limit = jnp.where(jnp.any(asked, axis=1)[None, :, None], limit, 0.0)
  own = given.key_logits(block_k)
  return limit + own.max(axis=1)[None, None, :]


def landmark(given: Blocked) -> Float[Array, "h i j"]:
  """Softmax over one key of each block, its last real one, mean over queries.

  Landmark attention (arXiv 2305.16300) trains a model to let the last token of
  a block speak for it. There a query's own block needs no landmark, and under
  a causal pattern most of its queries do not see it: name it in `keep`. The
  mean over the queries of a block is ours; each query retrieves for itself
  there. Cost: 1 / block_k of the scores.
  """
  q, k, block_q, block_k = given.q, given.k, given.block_q, given.block_k
  n = k.shape[1]
  there = given.there(block_k)
  last = block_k - 1 - jnp.argmax(there[:, ::-1], axis=1).astype(jnp.int32)
  at = jnp.minimum(jnp.arange(there.shape[0]) * block_k + last, n - 1)
  own = given.key_logits(block_k)
  own = jnp.take_along_axis(own, last[:, None], axis=1)[:, 0]
  asked = given.asked(block_q)
  count = jnp.maximum(asked.sum(axis=1), 1)[:, None]

  def one(h, q, k):
    logits = q.shape[-1] ** -0.5 * (q @ k.T) + own[None, :]
    shown = blocks.seen(given.pattern, h, jnp.arange(q.shape[0]), at)
    p = blocks.softmax(jnp.where(shown, logits, -jnp.inf))
    p = jnp.where(asked[:, :, None], blocks.cut(p, block_q), 0.0)
    return blocks.log(p.sum(axis=1) / count)

  q, k = q.astype(jnp.float32), k[:, at].astype(jnp.float32)
  return blocks.each_head(one, q, k)


def _mean(
  cells: Float[Array, "g j b d"], there: Bool[Array, "j b"]
) -> Float[Array, "g j d"]:
  """Mean over the real tokens of each block; 0 if there is none."""
  total = jnp.where(there[None, :, :, None], cells, 0.0).sum(axis=2)
  return total / jnp.maximum(there.sum(axis=1), 1)[None, :, None]


def _products(
  q: Float[Array, "h i d"], k: Float[Array, "h j d"]
) -> Float[Array, "h i j"]:
  return q.shape[-1] ** -0.5 * jnp.einsum("hid,hjd->hij", q, k)
