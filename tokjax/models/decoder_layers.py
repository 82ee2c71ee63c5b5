"""Parts of a decoder block: norm, projections with rotary positions, MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.models.activations import ACTIVATIONS
from tokjax.models.adapters import LowRank
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.products import dot_general


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale, in float32.

  Attributes:
    epsilon: see above.
    from_one: the factor is 1 + scale and is applied before rounding to
      `dtype` (Gemma); otherwise after it (Llama).
    dtype: of the result.
  """

  epsilon: float
  from_one: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.from_one else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],))
    scale = scale.astype(jnp.float32)[(None,) * (x.ndim - 1)]
    y = x.astype(jnp.float32)
    mean = jnp.square(y).mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean + self.epsilon)
    if self.from_one:
      return (y * (1 + scale)).astype(self.dtype)
    return y.astype(self.dtype) * scale.astype(self.dtype)


def norm(config: DecoderConfig, dtype: Any, name: str | None = None) -> RMSNorm:
  """A norm as the architecture wants it."""
  return RMSNorm(config.epsilon, config.norm_from_one, dtype, name=name)


class Projections(nn.Module):
  """The projections of a block's attention; what lies between is a slot's.

  Attributes:
    config: the architecture.
    dtype: of activations.
    adapter_rank: of trainable low-rank updates of query and value; 0: none.
  """

  config: DecoderConfig
  dtype: Any
  adapter_rank: int = 0

  def setup(self):
    cfg = self.config

    def dense(size, bias):
      return nn.Dense(
        size, use_bias=bias, dtype=self.dtype, dot_general=dot_general
      )

    self.query = dense(cfg.heads * cfg.features, cfg.qkv_bias)
    self.key = dense(cfg.kv_heads * cfg.features, cfg.qkv_bias)
    self.value = dense(cfg.kv_heads * cfg.features, cfg.qkv_bias)
    self.out = dense(cfg.width, cfg.out_bias)
    if self.adapter_rank:
      adapt = lambda heads: LowRank(
        heads * cfg.features, self.adapter_rank, self.dtype
      )
      self.adapt_query = adapt(cfg.heads)
      self.adapt_value = adapt(cfg.kv_heads)
    if cfg.qk_norm:
      self.query_norm = norm(cfg, self.dtype)
      self.key_norm = norm(cfg, self.dtype)

  def __call__(
    self, x: Float[Array, "b t d"]
  ) -> tuple[
    Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g k"]
  ]:
    """Queries, keys and values, not rotated."""
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.adapter_rank:
      q, v = q + self.adapt_query(x), v + self.adapt_value(x)
    q = self._split(q, self.config.heads)
    k, v = (self._split(y, self.config.kv_heads) for y in (k, v))
    if self.config.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    return q, k, v

  def _split(self, x, heads):
    return x.reshape(*x.shape[:2], heads, self.config.features)

  def output(self, y: Float[Array, "b t h k"]) -> Float[Array, "b t d"]:
    """The heads' outputs, put together and projected."""
    return self.out(y.astype(self.dtype).reshape(*y.shape[:2], -1))


class GatedMlp(nn.Module):
  """down(activation(gate(x)) * up(x))."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x):
    cfg = self.config

    def dense(size, name):
      return nn.Dense(
        size, use_bias=cfg.mlp_bias, dtype=self.dtype, name=name,
        dot_general=dot_general,
      )  # fmt: skip

    gate = ACTIVATIONS[cfg.activation](dense(cfg.mlp_dim, "gate")(x))
    return dense(x.shape[-1], "down")(gate * dense(cfg.mlp_dim, "up")(x))
