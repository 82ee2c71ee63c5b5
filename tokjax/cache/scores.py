"""How much the entries of a prompt matter: one example's `Prompt` to `[G, n]`.

Query heads that share a key head are reduced here, since a cache holds key
heads. Scores of padding may be anything.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import aot
from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import attention_mass
from tokjax.attention import core
from tokjax.cache.prompt import Prompt
from tokjax.layer import Arrivals, Layer
from tokjax.scores import pool

Reduction = Literal["mean", "max", "sum"]


def recent(prompt: Prompt) -> Float[Array, "g n"]:
  """The later the better."""
  return _wide(prompt, prompt.position.astype(jnp.float32))


def _wide(prompt: Prompt, score: Array) -> Float[Array, "g n"]:
  return jnp.broadcast_to(score[None], (prompt.layer.kv_heads, *score.shape))


def noise(prompt: Prompt, *, seed: int) -> Float[Array, "g n"]:
  """Independent uniform noise for each layer, head and position."""
  key = jax.random.fold_in(jax.random.key(seed), prompt.layer.number)
  draw = lambda head, at: jax.random.uniform(
    jax.random.fold_in(jax.random.fold_in(key, head), at)
  )
  heads = jnp.arange(prompt.layer.kv_heads)
  return jax.vmap(lambda h: jax.vmap(lambda p: draw(h, p))(prompt.position))(
    heads
  )


def key_norm(prompt: Prompt) -> Float[Array, "g n"]:
  """Minus the length of the key, which no rotation changes (Knorm)."""
  return -jnp.linalg.norm(prompt.k.astype(jnp.float32), axis=-1).T


def one_of(
  token: Int[Array, "*b n"], tokens: tuple[int, ...]
) -> Bool[Array, "*b n"]:
  """Whether each id is among `tokens`."""
  return jnp.isin(token, jnp.asarray(tokens, token.dtype))


def separators(
  prompt: Prompt, *, tokens: tuple[int, ...]
) -> Float[Array, "g n"]:
  """The newest separators; other tokens never stay for their score."""
  chosen = one_of(prompt.token, tokens)
  return _wide(
    prompt, jnp.where(chosen, prompt.position.astype(jnp.float32), -jnp.inf)
  )


def arriving_separators(
  arrivals: Arrivals, *, tokens: tuple[int, ...]
) -> Float[Array, "b"]:
  """`separators` of the one token that a step brings."""
  position = arrivals.position[:, 0].astype(jnp.float32)
  return jnp.where(one_of(arrivals.token[:, 0], tokens), position, -jnp.inf)


def rows(
  prompt: Prompt, at: Int[Array, "c"], k: Float[Array, "n g d"]
) -> Float[Array, "g r c n"]:
  """Attention of the prompt's queries numbered `at`; zeros where padding."""
  layer = prompt.layer
  q = layer.rotate(prompt.q[at], prompt.q_position[at])
  x = core.logits_of_example(layer, q, k)
  seen = core.visible(
    layer, prompt.q_position[at], prompt.position, prompt.valid
  )
  seen = seen & prompt.q_valid[at][:, None]
  return core.softmax(x, seen[None, None])


def column_sums(
  prompt: Prompt, weight: Float[Array, "w"] | None = None
) -> Float[Array, "g r n"]:
  """Attention that keys receive from the prompt's queries, never normalised.

  Args:
    prompt: its `q` are the queries summed over.
    weight: of each query; default 1.
  """
  k, w = prompt.rotated_k, prompt.q.shape[0]
  weight = jnp.ones((w,)) if weight is None else weight
  # Blocks tell distances by place, which a window asks for by position.
  by_place = prompt.layer.window is None or not prompt.gaps
  # A GPU has no kernel for it, and XLA's loop over blocks would leave it idle.
  if w == k.shape[0] >= core.LONG and by_place and aot.platform() != "gpu":
    return _sums_by_blocks(prompt, k, weight)
  if w <= core.BLOCK:
    return jnp.einsum("grcn,c->grn", rows(prompt, jnp.arange(w), k), weight)
  blocks = -(-w // core.BLOCK)
  at = jnp.arange(blocks * core.BLOCK).reshape(blocks, -1)

  def step(total, at):
    # Beyond the last query the weight is zero.
    own = jnp.where(at < w, weight[jnp.minimum(at, w - 1)], 0.0)
    part = rows(prompt, jnp.minimum(at, w - 1), k)
    return total + jnp.einsum("grcn,c->grn", part, own), None

  layer = prompt.layer
  zero = jnp.zeros((layer.kv_heads, layer.group, k.shape[0]))
  return jax.lax.scan(step, zero, at)[0]


def _sums_by_blocks(prompt: Prompt, k: Array, weight: Array) -> Array:
  """`column_sums` of a long prompt that is there whole, padding last."""
  layer, n = prompt.layer, k.shape[0]
  seen = core.in_window(layer, layouts.Causal())
  mass = attention_mass(
    prompt.rotated_q, k, layout=layouts.from_pattern(seen, q_len=n),
    weights=jnp.where(prompt.q_valid, weight, 0.0)[None], lse=prompt.lse,
    scale=layer.factor, soft_cap=layer.soft_cap,
  )  # fmt: skip
  return mass.reshape(layer.kv_heads, layer.group, n)


def reduce_heads(x: Array, how: Reduction) -> Array:
  """Over the query heads of a key head, axis 1."""
  return {"mean": jnp.mean, "max": jnp.max, "sum": jnp.sum}[how](x, axis=1)


def received(prompt: Prompt) -> Float[Array, "g n"]:
  """Attention received from all queries, summed over a group (H2O)."""
  return reduce_heads(column_sums(prompt), "sum")


def last_window(
  prompt: Prompt,
  *,
  kernel: int,
  pooling: Literal["avg", "max"],
  heads: Reduction = "mean",
  heads_first: bool = False,
) -> Float[Array, "g n"]:
  """Attention from the last queries, pooled over neighbours (SnapKV).

  Columns of the window itself are taken out before pooling.

  Args:
    prompt: its `q` are those of the window.
    kernel, pooling: see `pool`; 1: none.
    heads: how query heads of a key head are reduced.
    heads_first: whether that is done before pooling (AdaKV).
  """
  w = prompt.q_valid.sum()
  early = jnp.arange(prompt.k.shape[0]) < prompt.length - w
  mass = column_sums(prompt) / jnp.maximum(w, 1)
  mass = jnp.where(early[None, None], mass, 0.0)
  if heads_first:
    return pool(reduce_heads(mass, heads), kernel, pooling)
  return reduce_heads(pool(mass, kernel, pooling), heads)


def mean_rotation(
  layer: Layer, start: Int[Array, ""], steps: int
) -> Float[Array, "d d"]:
  """Mean of the rotation matrices at positions start .. start + steps - 1."""
  d = layer.head_dim
  basis = jnp.broadcast_to(jnp.eye(d), (steps, d, d))
  turned = layer.rotate(basis, start + jnp.arange(steps))
  return turned.mean(axis=0).T


def expected(
  prompt: Prompt,
  *,
  sinks: int,
  future: int,
  covariance: bool,
  value_norm: bool,
  epsilon: float,
) -> Float[Array, "g n"]:
  """Attention that future queries are expected to pay, times value length.

  Queries are taken as Gaussian, with the moments of the prompt's own before
  rotation, turned by the mean rotation of the next `future` positions.
  ExpectedAttention (kvpress, expected_attention_press.py, 8bb29b9). Scores of
  the sinks are for protection to replace.

  Args:
    prompt: its `q` are all queries.
    sinks: first tokens left out of moments and softmax.
    future: number of positions averaged over.
    covariance: whether the second moment counts.
    value_norm: whether to multiply by the length of the value.
    epsilon: added to probabilities before that.
  """
  layer = prompt.layer
  late = prompt.q_valid & (jnp.arange(prompt.q.shape[0]) >= sinks)
  count = jnp.maximum(late.sum(), 1)
  q = jnp.where(late[:, None, None], prompt.q, 0.0).astype(jnp.float32)
  mean = q.sum(axis=0) / count  # [H, D]
  apart = jnp.where(late[:, None, None], q - mean[None], 0.0)
  spread = jnp.einsum("nhd,nhe->hde", apart, apart) / count
  turn = mean_rotation(layer, prompt.length, future)
  mean = mean @ turn.T
  spread = jnp.einsum("ad,hde,be->hab", turn, spread, turn)
  k = prompt.rotated_k.astype(jnp.float32)
  group = lambda x: x.reshape(layer.kv_heads, layer.group, *x.shape[1:])
  z = layer.factor * jnp.einsum("grd,ngd->grn", group(mean), k)
  if covariance:
    second = jnp.einsum("ngd,grde,nge->grn", k, group(spread), k)
    z = z + layer.factor**2 / 2 * second
  seen = prompt.valid & (jnp.arange(k.shape[0]) >= sinks)
  score = core.softmax(z, seen[None, None]).mean(axis=1)
  if value_norm:
    norm = jnp.linalg.norm(prompt.v.astype(jnp.float32), axis=-1).T
    score = (score + epsilon) * norm
  return score
