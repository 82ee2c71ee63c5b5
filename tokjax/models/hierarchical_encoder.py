"""Long documents as one vector: a transformer over blocks of words (SMITH).

A document is cut into blocks of words. One encoder makes a unit vector of each
block, another one, over the vectors of the blocks, a unit vector of the whole
document. Two documents match if their vectors are alike. Before that, words
and whole blocks are masked and predicted; a masked block has to be told from
all other masked blocks of the batch.

Yang et al., 2020 (arXiv 2004.12297); from google-research/google-research:
smith/modeling.py, layers.py, loss_fns.py, bert/modeling.py (0c1bbe5), read; the
release needs TensorFlow. An encoder was run next to `BertModel` of transformers
on the same weights. Deviations: documents of a batch share all weights, where
the release has a last projection for each side; token types and dropout are
left out; padded blocks are not attended to and count nowhere (there they may be
drawn as masked ones, and are then among the wrong answers); the bias that the
release learns for each place of a batch among its masked blocks is left out, as
are sums, means and averages of block vectors next to the document's.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax.attention import core

EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class HierarchicalConfig:
  """An architecture.

  Attributes:
    vocabulary: ids there are.
    width, heads, mlp_dim: of both encoders.
    block: words a block.
    blocks: of a document, at most.
    depth, depth_above: layers of the encoder of words, and of that of blocks.
  """

  vocabulary: int
  width: int = 256
  heads: int = 4
  mlp_dim: int = 1024
  block: int = 32
  blocks: int = 48
  depth: int = 4
  depth_above: int = 3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(
          f"{field.name}={getattr(self, field.name)}: must be 1 or more"
        )
    if self.width % self.heads:
      raise ValueError(f"heads={self.heads}: must divide width={self.width}")


def _dense(size: int, name: str) -> nn.Dense:
  return nn.Dense(size, kernel_init=nn.initializers.normal(0.02), name=name)


def _norm(name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=EPSILON, name=name)


class PostNormBlock(nn.Module):
  """Attention and MLP, each normed behind its residual."""

  config: HierarchicalConfig

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"]):
    cfg = self.config
    split = lambda name: _dense(cfg.width, name)(x).reshape(
      *x.shape[:2], cfg.heads, -1
    )
    q, k, v = map(split, ("query", "key", "value"))
    z = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weight = jax.nn.softmax(z, axis=-1, where=valid[:, None, None])
    y = jnp.einsum("bhij,bjhd->bihd", weight, v).reshape(x.shape)
    x = _norm("norm1")(x + _dense(cfg.width, "out")(y))
    y = nn.gelu(_dense(cfg.mlp_dim, "fc1")(x), approximate=True)
    return _norm("norm2")(x + _dense(cfg.width, "fc2")(y))


class Tower(nn.Module):
  """Positions, layers, and a unit vector from the first place.

  Attributes:
    config: of the whole.
    depth: layers.
    length: places, at most.
  """

  config: HierarchicalConfig
  depth: int
  length: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"]
  ) -> tuple[Float[Array, "b d"], Float[Array, "b n d"]]:
    init = nn.initializers.normal(0.02)
    table = self.param("position", init, (self.length, self.config.width))
    x = _norm("norm")(x + table[None, : x.shape[1]])
    for i in range(self.depth):
      x = PostNormBlock(self.config, name=f"block_{i}")(x, valid)
    y = jnp.tanh(_dense(self.config.width, "pool")(x[:, 0]))
    return unit(jax.nn.relu(_dense(self.config.width, "project")(y))), x


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
  """Vectors of length 1; zeros stay zeros."""
  square = jnp.square(x).sum(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, EPSILON))


class HierarchicalEncoder(nn.Module):
  """See the module.

  Attributes:
    config: the architecture.
  """

  config: HierarchicalConfig

  def setup(self):
    cfg = self.config
    init = nn.initializers.normal(0.02)
    self.embed = nn.Embed(cfg.vocabulary, cfg.width, embedding_init=init)
    self.words = Tower(cfg, cfg.depth, cfg.block)
    self.above = Tower(cfg, cfg.depth_above, cfg.blocks)
    self.hidden = self.param("hidden", init, (cfg.width,))
    for name in ("word", "block"):
      setattr(self, f"{name}_dense", _dense(cfg.width, f"{name}_dense"))
      setattr(self, f"{name}_norm", _norm(f"{name}_norm"))
    self.word_bias = self.param(
      "word_bias", nn.initializers.zeros, (cfg.vocabulary,)
    )

  def __call__(
    self, ids: Int[Array, "b m s"], valid: Bool[Array, "b m s"]
  ) -> Float[Array, "b d"]:
    """Unit vectors of documents; their blocks' words, padding behind them."""
    vectors, real, _ = self.blocks_of(ids, valid)
    return self.above(vectors, real)[0]

  def blocks_of(
    self, ids: Int[Array, "b m s"], valid: Bool[Array, "b m s"]
  ) -> tuple[
    Float[Array, "b m d"], Bool[Array, "b m"], Float[Array, "b m s d"]
  ]:
    """Unit vectors of blocks, which of them are real, and states of words."""
    b, m, s = ids.shape
    if s > self.config.block or m > self.config.blocks:
      raise ValueError(
        f"ids: {m} blocks of {s} words; there are places for"
        f" {self.config.blocks} of {self.config.block}"
      )
    x = self.embed(jnp.where(valid, ids, 0).reshape(b * m, s))
    vectors, states = self.words(x, valid.reshape(b * m, s))
    real = valid.any(axis=-1)
    vectors = jnp.where(real[..., None], vectors.reshape(b, m, -1), 0.0)
    return vectors, real, states.reshape(b, m, s, -1)

  def word_loss(
    self,
    ids: Int[Array, "b m s"],
    valid: Bool[Array, "b m s"],
    target: Int[Array, "b m s"],
    asked: Bool[Array, "b m s"],
  ) -> Float[Array, ""]:
    """Cross entropy of masked words: a sum over blocks of means over the batch.

    Args:
      ids: with masked words replaced.
      valid: real words.
      target: the words themselves.
      asked: which were masked.
    """
    states = self.blocks_of(ids, valid)[2]
    y = nn.gelu(self.word_dense(states), approximate=True)
    logits = self.embed.attend(self.word_norm(y))
    logits += self.word_bias[None, None, None]
    each = jax.nn.log_softmax(logits)
    each = -jnp.take_along_axis(each, target[..., None], axis=-1)[..., 0]
    total = jnp.where(asked, each, 0.0).sum(axis=(0, 2))
    return (total / (asked.sum(axis=(0, 2)) + 1e-5)).sum()

  def block_loss(
    self,
    ids: Int[Array, "b m s"],
    valid: Bool[Array, "b m s"],
    key: PRNGKeyArray,
    masked: int = 2,
  ) -> Float[Array, ""]:
    """Cross entropy of telling masked blocks from all others that are masked.

    Args:
      ids, valid: of documents.
      key: of the choice of blocks.
      masked: blocks of each document, two or more; fewer where it has fewer.
    """
    if masked < 2:
      raise ValueError(f"masked={masked}: must be 2 or more")
    vectors, real, _ = self.blocks_of(ids, valid)
    draw = jax.random.uniform(key, real.shape)
    order = jnp.argsort(jnp.where(real, draw, 2.0), axis=1)[:, :masked]
    there = jnp.take_along_axis(real, order, axis=1)
    one = lambda x, i: x.at[i].set(self.hidden)
    states = self.above(jax.vmap(one)(vectors, order), real)[1]
    of = lambda x: core.taken(x, order).reshape(-1, x.shape[-1])
    guess = nn.gelu(self.block_dense(of(states)), approximate=True)
    there = there.reshape(-1)
    logits = self.block_norm(guess) @ of(vectors).T
    logits = jnp.where(there[None], logits, -jnp.inf)
    each = jnp.where(there, jax.nn.logsumexp(logits, axis=-1), 0.0)
    each = each - jnp.where(there, jnp.diagonal(logits), 0.0)
    return each.sum() / (there.sum() + 1e-5)


def matching_loss(
  one: Float[Array, "b d"],
  other: Float[Array, "b d"],
  match: Bool[Array, "b"],
  *,
  factor: float = 6.0,
  positive: float = 1.0,
) -> Float[Array, ""]:
  """Cross entropy of whether documents match, from the product of vectors.

  Args:
    one, other: unit vectors of documents.
    match: whether they do.
    factor: on products, for logits.
    positive: weight of pairs that match.
  """
  logit = factor * (one * other).sum(axis=-1)
  right = jnp.where(match, logit, -logit)
  weight = jnp.where(match, positive, 1.0)
  return -(weight * jax.nn.log_sigmoid(right)).mean()
