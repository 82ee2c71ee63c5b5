"""Where a text falls into chunks, predicted from keys (DHSA).

A place ends a chunk where later tokens attend to what is left and right of it
very differently. A small network learns that from the keys alone. Checked
against legacy/boundary_predictor/models.py, loss.py and legacy/utils/helper.py
(cc8e9c7). All functions are those of one example.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax.attention import core

HEADS, HIDDEN = 4, 256
EPSILON = 1e-6


def parameters(channels: int, key: PRNGKeyArray) -> dict[str, Array]:
  """Of the predictor; the keys of a token have `channels` in all heads."""
  made = {}
  shapes = {
    "query": (channels, channels), "key": (channels, channels),
    "value": (channels, channels), "out": (channels, channels),
    "hidden": (4 * channels + 1, HIDDEN), "last": (HIDDEN, 1),
  }  # fmt: skip
  for i, (name, shape) in enumerate(shapes.items()):
    drawn = jax.random.normal(jax.random.fold_in(key, i), shape)
    made[name] = drawn * shape[0] ** -0.5
    made[f"{name}_bias"] = jnp.zeros(shape[1:])
  made["norm"] = jnp.ones((channels,))
  made["norm_bias"] = jnp.zeros((channels,))
  return made


def logits(
  params: dict[str, Array], k: Float[Array, "n c"], window: int
) -> Float[Array, "n"]:
  """How likely a chunk ends at each token, as a logit.

  Args:
    params: see `parameters`.
    k: keys, heads next to each other, zeros in padding.
    window: tokens on either side that are compared.
  """
  n = k.shape[0]
  padded = jnp.pad(k.astype(jnp.float32), [(window - 1, window), (0, 0)])

  def rows(at):
    near = padded[at[:, None] + jnp.arange(2 * window)[None]]
    return _compared(params, near, window)[None]

  return core.over_rows(rows, n)[0]


def _compared(
  params: dict[str, Array], x: Float[Array, "m w c"], window: int
) -> Float[Array, "m"]:
  """Logits of windows: attention within each, then its halves compared."""
  wide = lambda name, x: params[name].reshape((1,) * (x.ndim - 1) + (-1,))
  dense = lambda name, x: x @ params[name] + wide(f"{name}_bias", x)
  split = lambda x: x.reshape(*x.shape[:2], HEADS, -1)
  q, k, v = (split(dense(name, x)) for name in ("query", "key", "value"))
  p = jnp.einsum("mihd,mjhd->mhij", q, k) * q.shape[-1] ** -0.5
  y = jnp.einsum("mhij,mjhd->mihd", jax.nn.softmax(p), v).reshape(x.shape)
  y = dense("out", y)
  y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(
    y.var(-1, keepdims=True) + 1e-5
  )
  y = y * wide("norm", y) + wide("norm_bias", y)
  left, right = y[:, :window].mean(axis=1), y[:, window:].mean(axis=1)
  norm = lambda x: jnp.maximum(jnp.linalg.norm(x, axis=-1), EPSILON)
  cosine = (left * right).sum(axis=-1) / (norm(left) * norm(right))
  features = jnp.concatenate(
    [left, right, jnp.abs(left - right), left * right, cosine[:, None]], -1
  )
  hidden = jax.nn.relu(dense("hidden", features))
  return dense("last", hidden)[:, 0]


def inside(
  length: Int[Array, ""], n: int, window: int
) -> Bool[Array, "n"]:
  """Places with whole windows on either side."""
  place = jnp.arange(n)
  return (place >= window - 1) & (place < length - window)


def ends(
  score: Float[Array, "n"],
  may: Bool[Array, "n"],
  *,
  apart: int,
  forced: Int[Array, ""],
  most: Int[Array, ""],
) -> Bool[Array, "n"]:
  """Places that end a chunk: the best ones, none too near a better one.

  Args:
    score: of every place; ties go to the lower one.
    may: places to choose from.
    apart: chosen places lie farther than this from each other.
    forced: a place that is chosen in any case, before which all others lie.
    most: how many are chosen at most, the forced one included.
  """
  place = jnp.arange(score.shape[0])
  start = place == forced
  may = may & (place < forced) & ~_near(start, apart)
  order = jnp.argsort(jnp.where(may, -score, jnp.inf), stable=True)
  rank = jnp.zeros_like(order).at[order].set(place)
  last = score.shape[0]

  def step(state):
    # A place that no better one is near to is chosen by a greedy search, too.
    chosen, left = state
    here = jnp.where(left, rank, last)
    first = -_widest(-here, apart, -last)
    new = left & (here == first)
    return chosen | new, left & ~_near(new, apart)

  none = jnp.zeros_like(may)
  chosen, _ = jax.lax.while_loop(lambda s: s[1].any(), step, (none, may))
  best = jnp.argsort(jnp.where(chosen, rank, last))
  number = jnp.zeros_like(best).at[best].set(place)
  return start | (chosen & (number < most - 1))


def _widest(x: Array, reach: int, low: int) -> Array:
  """The largest value within `reach` places."""
  return jax.lax.reduce_window(
    x, jnp.asarray(low, x.dtype), jax.lax.max, (2 * reach + 1,), (1,), "SAME"
  )


def _near(x: Bool[Array, "n"], reach: int) -> Bool[Array, "n"]:
  """Whether one is within `reach` places."""
  return _widest(x.astype(jnp.int32), reach, 0) > 0


def contrast(
  attention: Float[Array, "n n"], length: Int[Array, ""], window: int
) -> Float[Array, "n"]:
  """How differently later tokens attend to the two sides of each place.

  The larger of both sums over the smaller one; 0 where a side is not whole.
  Places where it is 2 or more are what the predictor learns.

  Args:
    attention: causal, mean over heads.
    length: real tokens.
    window: tokens on either side.
  """
  n = attention.shape[0]
  place = jnp.arange(n)
  rows = jnp.where((place < length)[:, None], attention, 0.0)
  # Sums over the last rows, from row i on.
  below = jnp.cumsum(rows[::-1], axis=0)[::-1]
  sums = jnp.pad(jnp.cumsum(below, axis=1), [(0, window + 1), (1, window)])
  at = jnp.minimum(place + window, n)
  upto = lambda j: sums[at, jnp.clip(j, 0, n)]
  left = upto(place + 1) - upto(place + 1 - window)
  right = upto(place + 1 + window) - upto(place + 1)
  larger = jnp.maximum(left, right) + EPSILON
  ratio = larger / (jnp.minimum(left, right) + EPSILON)
  return jnp.where(inside(length, n, window), ratio, 0.0)


def focal_loss(
  logit: Float[Array, "n"],
  target: Float[Array, "n"],
  mask: Bool[Array, "n"],
  positive: float = 1.3,
  gamma: float = 2.0,
) -> Float[Array, ""]:
  """Binary cross-entropy that dwells on what is predicted badly.

  Args:
    logit: of a boundary.
    target: in [0, 1].
    mask: places that count; the loss is their mean.
    positive: weight of boundaries.
    gamma: power of the probability that is missing.
  """
  off = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
  entropy = -(positive * target * off[0] + (1 - target) * off[1])
  p = jax.nn.sigmoid(logit)
  right = p * target + (1 - p) * (1 - target)
  loss = jnp.where(mask, (1 - right) ** gamma * entropy, 0.0)
  return loss.sum() / jnp.maximum(mask.sum(), 1)
