"""Estimates from rows of attention: strided, sampled, the last, or all."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import block_mass
from tokjax import selection
from tokjax.attention.estimators import blocks
from tokjax.attention.estimators.blocks import Blocked


def antidiagonal(given: Blocked, *, stride: int = 16) -> Float[Array, "h i j"]:
  """Softmax over the antidiagonals of stride x stride tiles, summed by block.

  XAttention (arXiv 2503.16428; checked against `xattn_estimate` of
  xattn/src/Xattention.py, mode "inverse"): the logit of a tile is the sum of
  its antidiagonal over `stride`, missing tokens being zeros; biases, which it
  does not have, add the logarithm of their mean over the tile. A tile is
  visible where its last query may see its first key, which is its rule for a
  causal pattern and extends it to others. Cost: 1 / stride of the scores.

  Raises:
    ValueError: if `stride` does not divide the block sizes.
  """
  block_q, block_k = given.block_q, given.block_k
  if stride < 1 or block_q % stride or block_k % stride:
    raise ValueError(
      f"stride={stride}: must divide block_q={block_q} and block_k={block_k}"
    )
  q, k = given.q, given.k
  heads, m, width = q.shape
  asked, there = given.asked(stride), given.there(stride)
  own = blocks.log_sum(given.key_logits(stride))
  own = own - jnp.log(jnp.maximum(there.sum(axis=1), 1))
  tiles = lambda x, shown: jnp.where(
    shown[None, :, :, None], blocks.cut(x, stride), 0.0
  )
  queries = tiles(q, asked)[:, :, ::-1].reshape(heads, -1, stride * width)
  keys = tiles(k, there).reshape(k.shape[0], -1, stride * width)
  last = jnp.arange(queries.shape[1]) * stride + stride - 1
  first = jnp.arange(keys.shape[1]) * stride
  counts = jnp.any(asked, axis=1)[:, None]

  def one(h, q, k):
    logits = (q @ k.T) * (width**-0.5 / stride) + own[None, :]
    shown = blocks.seen(given.pattern, h, jnp.minimum(last, m - 1), first)
    p = blocks.softmax(jnp.where(shown, logits, -jnp.inf))
    p = by_key_block(jnp.where(counts, p, 0.0), block_k // stride)
    return blocks.log(blocks.cut(p, block_q // stride).sum(axis=1))

  return blocks.each_head(one, queries, keys)


def sampled(given: Blocked, *, samples: int = 4) -> Float[Array, "h i j"]:
  """Exact attention of a few queries of each block, summed by key block.

  The samples stand evenly spaced among the real queries of a block, the first
  among them, so that nothing is random. SampleAttention (arXiv 2406.15486)
  takes its stripes from strided rows likewise, for the whole head at once.
  Cost: samples / block_q of the scores.

  Raises:
    ValueError: if a block has fewer queries than `samples`.
  """
  block_q = given.block_q
  if not 1 <= samples <= block_q:
    raise ValueError(f"samples={samples}: must lie in 1..block_q={block_q}")
  asked = given.asked(block_q)
  count = asked.sum(axis=1)
  order = jax.vmap(selection.partition)(asked).index
  pick = jnp.arange(samples)[None, :] * count[:, None] // samples
  start = jnp.arange(asked.shape[0])[:, None] * block_q
  rows = start + jnp.take_along_axis(order, pick, axis=1)
  mass = mass_of_rows(given, rows.reshape(-1))
  mass = mass.reshape(mass.shape[0], -1, samples, mass.shape[-1])
  return blocks.log(mass.mean(axis=2))


def last_query(given: Blocked, *, rows: int = 64) -> Float[Array, "h i j"]:
  """Exact attention of the last real queries, for every query block alike.

  What MInference (arXiv 2407.02490) finds its vertical lines by, and SnapKV
  (arXiv 2404.14469) the cache entries it keeps. Cost: rows / m of the scores.
  """
  m = given.q.shape[1]
  shown = jnp.ones((m,), bool) if given.q_mask is None else given.q_mask
  count = shown.sum()
  order = selection.partition(shown).index
  pick = count - 1 - jnp.arange(min(rows, m))
  mass = mass_of_rows(given, order[jnp.maximum(pick, 0)])
  mass = jnp.where(pick[None, :, None] >= 0, mass, 0.0).sum(axis=1)
  mass = blocks.log(mass / jnp.clip(count, 1, pick.shape[0]))
  shape = (mass.shape[0], -(-m // given.block_q), mass.shape[1])
  return jnp.broadcast_to(mass[:, None, :], shape)


def lse_cached(
  given: Blocked, *, lse: Float[Array, "h m"] | None = None
) -> Float[Array, "h i j"]:
  """The mass of every block by a second pass over queries and keys.

  With the log-sum-exps of an earlier pass, as AdaSpa (arXiv 2502.21079) keeps
  them from one denoising step to the next, the masses follow from the scores
  alone, block by block; without, they are computed first and the result is
  exact: what other estimators are judged by. Cost: that of the scores, or
  twice as much, without memory of that size.
  """
  q, k = (jnp.swapaxes(x, 0, 1) for x in (given.q, given.k))
  layout = layouts.from_pattern(
    given.pattern, q_len=q.shape[0], k_len=k.shape[0], block_q=given.block_q,
    block_k=given.block_k,
  )  # fmt: skip
  weights = given.q_mask
  mass = block_mass(
    q, k, layout=layout, lse=lse,
    weights=None if weights is None else weights.astype(jnp.float32)[None, :],
    bias=given.key_logits(1)[None, :, 0],
  )  # fmt: skip
  return blocks.log(mass)


def mass_of_rows(
  given: Blocked, rows: Int[Array, "r"]
) -> Float[Array, "h r j"]:
  """Attention of chosen queries, summed over each block of keys."""
  q, k, block_k = given.q, given.k, given.block_k
  n = k.shape[1]
  own = given.key_logits(block_k).reshape(-1)[:n]
  rows = jnp.minimum(rows.astype(jnp.int32), q.shape[1] - 1)

  def one(h, q, k):
    logits = q.shape[-1] ** -0.5 * (q @ k.T) + own[None, :]
    shown = blocks.seen(given.pattern, h, rows, jnp.arange(n))
    p = blocks.softmax(jnp.where(shown, logits, -jnp.inf))
    return by_key_block(p, block_k)

  q, k = q[:, rows].astype(jnp.float32), k.astype(jnp.float32)
  return blocks.each_head(one, q, k)


def by_key_block(p: Float[Array, "m n"], block: int) -> Float[Array, "m j"]:
  """Sums over each block of keys."""
  p = jnp.pad(p, ((0, 0), (0, -p.shape[1] % block)))
  return p.reshape(p.shape[0], -1, block).sum(axis=-1)
