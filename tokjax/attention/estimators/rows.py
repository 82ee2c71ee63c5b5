"""Estimates from rows of attention: strided, sampled, the last, or all."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import block_mass
from tokjax.attention.estimators import blocks

FULL = layouts.Full()


def antidiagonal(
  q: Float[Array, "h m d"],
  k: Float[Array, "g n d"],
  *,
  block_q: int,
  block_k: int,
  bias: Float[Array, "n"] | None = None,
  q_mask: Bool[Array, "m"] | None = None,
  k_mask: Bool[Array, "n"] | None = None,
  pattern: layouts.Pattern = FULL,
  stride: int = 16,
) -> Float[Array, "h i j"]:
  """Softmax over the antidiagonals of stride x stride tiles, summed by block.

  XAttention (arXiv 2503.16428; checked against `xattn_estimate` of
  xattn/src/Xattention.py, mode "inverse"): the logit of a tile is the sum of
  its antidiagonal over `stride`, missing tokens being zeros. A tile is visible
  where its last query may see its first key, which is its rule for a causal
  pattern and extends it to others. Cost: 1 / stride of the scores.

  Raises:
    ValueError: if `stride` does not divide the block sizes.
  """
  if stride < 1 or block_q % stride or block_k % stride:
    raise ValueError(
      f"stride={stride}: must divide block_q={block_q} and block_k={block_k}"
    )
  heads, m, width = q.shape
  n = k.shape[1]
  asked = blocks.real(q_mask, m, stride)
  there = blocks.real(k_mask, n, stride)
  own = blocks.log_sum(blocks.key_logits(bias, k_mask, n, stride))
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
    shown = blocks.seen(pattern, h, jnp.minimum(last, m - 1), first)
    p = blocks.softmax(jnp.where(shown, logits, -jnp.inf))
    p = by_key_block(jnp.where(counts, p, 0.0), block_k // stride)
    return blocks.log(blocks.cut(p, block_q // stride).sum(axis=1))

  return blocks.each_head(one, queries, keys)


def sampled(
  q: Float[Array, "h m d"],
  k: Float[Array, "g n d"],
  *,
  block_q: int,
  block_k: int,
  bias: Float[Array, "n"] | None = None,
  q_mask: Bool[Array, "m"] | None = None,
  k_mask: Bool[Array, "n"] | None = None,
  pattern: layouts.Pattern = FULL,
  samples: int = 4,
) -> Float[Array, "h i j"]:
  """Exact attention of a few queries of each block, summed by key block.

  The samples stand evenly spaced among the real queries of a block, the first
  among them, so that nothing is random. SampleAttention (arXiv 2406.15486)
  takes its stripes from strided rows likewise, for the whole head at once.
  Cost: samples / block_q of the scores.

  Raises:
    ValueError: if a block has fewer queries than `samples`.
  """
  if not 1 <= samples <= block_q:
    raise ValueError(f"samples={samples}: must lie in 1..block_q={block_q}")
  asked = blocks.real(q_mask, q.shape[1], block_q)
  count = asked.sum(axis=1)
  order = jnp.argsort(~asked, axis=1, stable=True)
  pick = jnp.arange(samples)[None, :] * count[:, None] // samples
  start = jnp.arange(asked.shape[0])[:, None] * block_q
  rows = start + jnp.take_along_axis(order, pick, axis=1)
  mass = mass_of_rows(
    q, k, rows.reshape(-1), block_k=block_k, bias=bias, k_mask=k_mask,
    pattern=pattern,
  )  # fmt: skip
  mass = mass.reshape(mass.shape[0], -1, samples, mass.shape[-1])
  return blocks.log(mass.mean(axis=2))


def last_query(
  q: Float[Array, "h m d"],
  k: Float[Array, "g n d"],
  *,
  block_q: int,
  block_k: int,
  bias: Float[Array, "n"] | None = None,
  q_mask: Bool[Array, "m"] | None = None,
  k_mask: Bool[Array, "n"] | None = None,
  pattern: layouts.Pattern = FULL,
  rows: int = 64,
) -> Float[Array, "h i j"]:
  """Exact attention of the last real queries, for every query block alike.

  What MInference (arXiv 2407.02490) finds its vertical lines by, and SnapKV
  (arXiv 2404.14469) the cache entries it keeps. Cost: rows / m of the scores.
  """
  m = q.shape[1]
  shown = jnp.ones((m,), bool) if q_mask is None else q_mask
  count = shown.sum()
  order = jnp.argsort(~shown, stable=True)
  pick = count - 1 - jnp.arange(min(rows, m))
  mass = mass_of_rows(
    q, k, order[jnp.maximum(pick, 0)], block_k=block_k, bias=bias,
    k_mask=k_mask, pattern=pattern,
  )  # fmt: skip
  mass = jnp.where(pick[None, :, None] >= 0, mass, 0.0).sum(axis=1)
  mass = blocks.log(mass / jnp.clip(count, 1, pick.shape[0]))
  shape = (mass.shape[0], -(-m // block_q), mass.shape[1])
  return jnp.broadcast_to(mass[:, None, :], shape)


def lse_cached(
  q: Float[Array, "h m d"],
  k: Float[Array, "g n d"],
  *,
  block_q: int,
  block_k: int,
  bias: Float[Array, "n"] | None = None,
  q_mask: Bool[Array, "m"] | None = None,
  k_mask: Bool[Array, "n"] | None = None,
  pattern: layouts.Pattern = FULL,
  lse: Float[Array, "h m"] | None = None,
) -> Float[Array, "h i j"]:
  """The mass of every block by a second pass over queries and keys.

  With the log-sum-exps of an earlier pass, as AdaSpa (arXiv 2502.21079) keeps
  them from one denoising step to the next, the masses follow from the scores
  alone, block by block; without, they are computed first and the result is
  exact: what other estimators are judged by. Cost: that of the scores, or
  twice as much, without memory of that size.
  """
  bias = jnp.zeros((k.shape[1],)) if bias is None else bias
  if k_mask is not None:
    bias = jnp.where(k_mask, bias, -jnp.inf)
  weights = None if q_mask is None else q_mask.astype(jnp.float32)[None, :]
  layout = layouts.from_pattern(
    pattern, q_len=q.shape[1], k_len=k.shape[1], block_q=block_q,
    block_k=block_k,
  )  # fmt: skip
  mass = block_mass(
    jnp.swapaxes(q, 0, 1), jnp.swapaxes(k, 0, 1), layout=layout, lse=lse,
    weights=weights, bias=bias[None, :],
  )  # fmt: skip
  return blocks.log(mass)


def mass_of_rows(
  q: Float[Array, "h m d"],
  k: Float[Array, "g n d"],
  rows: Int[Array, "r"],
  *,
  block_k: int,
  bias: Float[Array, "n"] | None,
  k_mask: Bool[Array, "n"] | None,
  pattern: layouts.Pattern,
) -> Float[Array, "h r j"]:
  """Attention of chosen queries, summed over each block of keys."""
  n = k.shape[1]
  own = blocks.key_logits(bias, k_mask, n, block_k).reshape(-1)[:n]
  rows = jnp.minimum(rows.astype(jnp.int32), q.shape[1] - 1)

  def one(h, q, k):
    logits = q.shape[-1] ** -0.5 * (q @ k.T) + own[None, :]
    shown = blocks.seen(pattern, h, rows, jnp.arange(n))
    p = blocks.softmax(jnp.where(shown, logits, -jnp.inf))
    return by_key_block(p, block_k)

  q, k = q[:, rows].astype(jnp.float32), k.astype(jnp.float32)
  return blocks.each_head(one, q, k)


def by_key_block(p: Float[Array, "m n"], block: int) -> Float[Array, "m j"]:
  """Sums over each block of keys."""
  p = jnp.pad(p, ((0, 0), (0, -p.shape[1] % block)))
  return p.reshape(p.shape[0], -1, block).sum(axis=-1)
