"""How much the answer will need each visual token: read with the question."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.reduce.stage import Stage
from tokjax.signals import Answers
from tokjax.tokens import Tokens


class ContextScore(nn.Module):
  """A score for every token, from all that arrive at a block: CoViPAL's module.

  One attention of a small width over visual and text tokens alike, in no order,
  and an MLP. Where losses are collected, in training, it sows its scores,
  minus infinity for tokens that no rule may touch, for `losses.Guided`.

  Attributes:
    width: of the attention and of the MLP.
  """

  width: int = 32

  @nn.compact
  def __call__(
    self, tokens: Tokens, answers: Answers, stage: Stage
  ) -> Float[Array, "b n"]:
    del answers
    x = nn.LayerNorm(1e-5, name="norm")(tokens.x.astype(jnp.float32))
    real = jnp.ones(x.shape[:2], bool)
    real = real if tokens.mask is None else tokens.mask
    x = jnp.where(real[..., None], x, 0.0)
    q, k, v = (
      nn.Dense(self.width, name=name)(x) for name in ("query", "key", "value")
    )
    product = jnp.einsum("bqd,bkd->bqk", q, k) * self.width**-0.5
    weight = jax.nn.softmax(product, axis=-1, where=real[:, None])
    y = nn.Dense(self.width, name="own")(x) + weight @ v
    y = nn.gelu(nn.Dense(self.width, name="hidden")(nn.gelu(y)))
    score = nn.Dense(1, name="out")(y)[..., 0]
    if self.is_mutable_collection("losses"):
      free = real & tokens.of_kind(stage.reduce.free.kinds)
      shown = jnp.where(free, score, -jnp.inf)
      self.sow("losses", "scores", shown, reduce_fn=lambda _, new: new)
    return score
