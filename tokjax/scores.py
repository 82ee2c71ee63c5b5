"""How much a token matters: from signals to `[n]`, higher is more important.

Shapes are those of one example. Heads are reduced here, so that the scorers
serve tokens (all heads together) and cache entries (one head, h = 1) alike.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def normalise(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
  """Rows of unit length; a zero row stays zero instead of becoming NaN."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))


def cosine(
  x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Float[Array, "n m"]:
  """Cosine similarity of every row of `x` with every row of `y`."""
  return normalise(x) @ normalise(y).T


def squared_distance(
  x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Float[Array, "n m"]:
  """Squared Euclidean distances, never negative."""
  cross = x @ y.T
  xx, yy = jnp.sum(x * x, axis=-1), jnp.sum(y * y, axis=-1)
  return jnp.maximum(xx[:, None] + yy[None, :] - 2 * cross, 0.0)


def random(key: PRNGKeyArray, n: int) -> Float[Array, "n"]:
  """Independent uniform noise: its top-k is a draw without replacement."""
  return jax.random.uniform(key, (n,))


def centrality(
  position: Float[Array, "n p"], *, mask: Bool[Array, "n"] | None = None
) -> Float[Array, "n"]:
  """Minus the squared distance to the middle of what the tokens cover.

  The middle lies half way between the smallest and the largest coordinate of
  the real tokens: on a grid of g cells a side at (g - 1) / 2.
  """
  low = high = position
  if mask is not None:
    low = jnp.where(mask[:, None], position, jnp.inf)
    high = jnp.where(mask[:, None], position, -jnp.inf)
  centre = (low.min(axis=0) + high.max(axis=0)) / 2
  return -jnp.sum(jnp.square(position - centre[None, :]), axis=-1)


def mean_over_heads(attention: Float[Array, "h n"]) -> Float[Array, "n"]:
  """Mean over heads, for one row of attention or for its column means."""
  return attention.mean(axis=0)


def attention_times_norm(
  attention: Float[Array, "h n"], values: Float[Array, "h n k"]
) -> Float[Array, "n"]:
  """Attention summed over heads times the length of the whole value vector.

  Adaptive Token Sampling's significance (heads of the value concatenated).
  """
  norm = jnp.sqrt(jnp.sum(jnp.square(values), axis=(0, 2)))
  return attention.sum(axis=0) * norm


def energy(
  features: Float[Array, "n d"],
  margin: float,
  *,
  alpha: float = 1.0,
  mask: Bool[Array, "n"] | None = None,
) -> Float[Array, "n"]:
  """How much company a token has: mean of ELU(cosine - margin) over all.

  High energy means redundant. PiToMe (Tran et al., 2024; checked against
  algo/pitome/merge.py, which subtracts the margin inside the ELU and counts
  the diagonal).
  """
  gap = cosine(features, features) - margin
  phi = jnp.where(gap > 0, gap, alpha * jnp.expm1(jnp.minimum(gap, 0.0)))
  if mask is None:
    return phi.mean(axis=-1)
  phi = jnp.where(mask[None, :], phi, 0.0)
  return phi.sum(axis=-1) / jnp.maximum(mask.sum(), 1)


def pagerank(
  attention: Float[Array, "h n n"],
  *,
  iterations: int,
  start: Float[Array, "n"] | None = None,
) -> Float[Array, "h n"]:
  """Importance votes along attention: `s <- A^T s`, per head.

  Weighted page rank of Zero-TPrune. The start is uniform unless given; the
  sum of s is conserved because rows of A sum to one.
  """
  n = attention.shape[-1]
  s = jnp.full((n,), 1.0 / n) if start is None else start / start.sum()
  s = jnp.broadcast_to(s, attention.shape[:-1])
  vote = lambda _, s: jnp.einsum("hqk,hq->hk", attention, s)
  return jax.lax.fori_loop(0, iterations, vote, s)


def rms_over_heads(
  score: Float[Array, "h n"],
  *,
  variance: tuple[float, float] = (0.0, float("inf")),
  mask: Bool[Array, "n"] | None = None,
) -> Float[Array, "n"]:
  """Root mean square over the heads whose scores are spread as allowed.

  Heads whose variance over tokens lies outside `variance` do not vote; if
  none is left, all do. Scores are scaled to mean one first, so that the
  bounds do not depend on the number of tokens. Zero-TPrune's emphasising
  informative region with variance-based head filter.
  """
  real = jnp.ones(score.shape[-1:], bool) if mask is None else mask
  count = jnp.maximum(real.sum(), 1)
  mass = jnp.where(real[None, :], score, 0.0)
  mean = mass.sum(axis=-1, keepdims=True) / count
  scaled = mass / jnp.where(mean > 0, mean, 1.0)
  apart = jnp.where(real[None, :], jnp.square(scaled - 1.0), 0.0)
  spread = apart.sum(axis=-1) / count
  votes = (spread >= variance[0]) & (spread <= variance[1])
  votes = jnp.where(votes.any(), votes, True).astype(score.dtype)
  power = jnp.einsum("h,hn->n", votes, jnp.square(mass)) / votes.sum()
  # The root has an infinite slope at zero; masked tokens must not feel it.
  return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0)


def transition(
  before: Float[Array, "n d"],
  after: Float[Array, "n d"],
  mask: Bool[Array, "n"] | None = None,
) -> Float[Array, "n"]:
  """How far a sub-layer moves each token: its stretch, weighted by its turn.

  The length of the output over that of the input, times the softmax over all
  tokens of 1 minus the cosine of both. TransPrune's token transition variation
  (Li et al., 2025; checked against llava/model/modeling_llama_transprune.py).

  Args:
    before: the (normed) input of the sub-layer.
    after: its output, before the residual is added.
    mask: False excludes a token, whose score is 0.
  """
  before, after = before.astype(jnp.float32), after.astype(jnp.float32)
  # No rounding of a root at zero, and no gradient through it.
  square = lambda x: jnp.square(x).sum(axis=-1)
  length = lambda x: jnp.sqrt(jnp.where(square(x) > 0, square(x), 1.0))
  cosine = jnp.sum(normalise(before) * normalise(after), axis=-1)
  share = jax.nn.softmax(1 - cosine, where=mask)
  moved = (square(before) > 0) & (square(after) > 0)
  return jnp.where(moved, length(after) / length(before) * share, 0.0)


def pool(
  x: Float[Array, "*b n"], kernel: int, how: Literal["avg", "max"]
) -> Float[Array, "*b n"]:
  """Pooling of stride 1 over the last axis, zeros around.

  The average counts the zeros, as in the official code of SnapKV; the maximum
  of non-negative values does not feel them.
  """
  if kernel % 2 == 0 or kernel < 1:
    raise ValueError(f"kernel={kernel}: must be odd")
  half, n = kernel // 2, x.shape[-1]
  pad = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)])
  parts = [pad[..., i : i + n] for i in range(kernel)]
  if how == "max":
    return functools.reduce(jnp.maximum, parts)
  if how == "avg":
    return functools.reduce(jnp.add, parts) / kernel
  raise ValueError(f"pooling={how!r}: must be 'avg' or 'max'")


def local_outliers(
  values: Float[Array, "n"],
  neighbours: int,
  *,
  mask: Bool[Array, "n"],
  above: float = 1.5,
) -> Bool[Array, "n"]:
  """Numbers whose neighbours are denser than they are, on either side.

  The local outlier factor of Breunig et al. (2000), as scikit-learn counts it:
  the density of a number is one over its mean distance to its nearest ones, a
  distance being at least that of the other to its own last neighbour.

  Args:
    values: numbers.
    neighbours: how many are compared; all, where there are fewer.
    mask: False excludes a number.
    above: outliers have a factor above this.
  """
  n = values.shape[0]
  k = max(min(neighbours, n - 1), 1)
  x = values.astype(jnp.float32)
  apart = jnp.abs(x[:, None] - x[None])
  other = mask[None] & ~jnp.eye(n, dtype=bool)
  far, near = jax.lax.top_k(jnp.where(other, -apart, -jnp.inf), k)
  count = jnp.minimum(k, mask.sum() - 1)
  used = jnp.arange(k) < count
  distance = jnp.where(used, -far, 0.0)
  reach = distance[:, jnp.maximum(count - 1, 0)]
  total = jnp.where(used, jnp.maximum(distance, reach[near]), 0.0).sum(axis=1)
  # As in scikit-learn.
  density = 1 / (total / jnp.maximum(count, 1) + 1e-10)
  around = jnp.where(used, density[near], 0.0).sum(axis=1)
  around = around / jnp.maximum(count, 1)
  return mask & (count > 0) & (around > above * density)
