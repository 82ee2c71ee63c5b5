"""Tokens to logits: norm, pooling, projection, classifier."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tokjax.models.encoder import Attention, Mlp, key_bias
from tokjax.tokens import Tokens


class Head(nn.Module):
  """What follows the encoder.

  Attributes:
    config: a `ViTConfig`.
    pool_by_size: pooling counts a merged token as all its members.
    dtype: of the features.
  """

  config: Any
  pool_by_size: bool
  dtype: Any

  @nn.compact
  def __call__(self, tokens: Tokens):
    """Returns the model's output and its intermediates; see `ViT`."""
    cfg = self.config
    norm = lambda x: x
    if cfg.head_norm != "none":
      norm = nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype, name="norm")
    x = norm(tokens.x) if cfg.head_norm == "tokens" else tokens.x
    pooled = self._pool(x, tokens)
    if cfg.head_norm == "pooled":
      pooled = norm(pooled)
    out, y = {"features": x, "pooled": pooled}, pooled
    if cfg.pooler is not None:
      y = jnp.tanh(nn.Dense(cfg.pooler, dtype=self.dtype, name="pooler")(y))
    if cfg.projection is not None:
      y = nn.Dense(
        cfg.projection, use_bias=False, dtype=self.dtype, name="projection"
      )(y)
    if cfg.num_classes is None:
      return y, out
    logits = self._classify(y, "classifier")
    if cfg.distilled:
      out["class_logits"] = logits
      out["distillation_logits"] = self._classify(
        x[:, 1], "distillation_classifier"
      )
      logits = (logits + out["distillation_logits"]) / 2
    return logits, out

  def _classify(self, x, name):
    return nn.Dense(self.config.num_classes, dtype=self.dtype, name=name)(x)

  def _pool(self, x, tokens):
    pool = self.config.pool
    if pool == "none":
      return x
    if pool == "class":
      return x[:, 0]
    if pool == "map":
      bias = key_bias(tokens) if self.pool_by_size else None
      pooler = AttentionPool(self.config, self.dtype, name="pool")
      return pooler(x, tokens.mask, bias)
    front, mask = len(self.config.kinds), tokens.mask
    x = x[:, front:]
    weight = jnp.ones(x.shape[:2], jnp.float32)
    if self.pool_by_size:
      weight = tokens.size[:, front:]
    if mask is not None:
      weight = jnp.where(mask[:, front:], weight, 0.0)
      x = jnp.where(mask[:, front:, None], x, 0.0)
    weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1e-6)
    # In float32: bfloat16 holds 1/196 with an error of 0.2 %.
    return jnp.einsum("bn,bnd->bd", weight, x.astype(jnp.float32)).astype(
      x.dtype
    )


class AttentionPool(nn.Module):
  """SigLIP's head: a learned probe attends to all tokens, then an MLP."""

  config: Any
  dtype: Any

  @nn.compact
  def __call__(self, x, mask, bias):
    cfg = self.config
    probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, cfg.width))
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, cfg.width)).astype(x.dtype)
    attention = Attention(
      cfg.width, cfg.heads, True, self.dtype, name="attention"
    )
    q, k, v = attention.project(probe, x)
    y = attention.output(attention.attend(q, k, v, bias=bias, mask=mask))
    norm = nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype, name="norm")
    mlp = Mlp(cfg.mlp_dim, cfg.activation, self.dtype, name="mlp")
    return (y + mlp(norm(y)))[:, 0]
