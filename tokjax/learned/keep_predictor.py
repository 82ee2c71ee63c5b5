"""DynamicViT's predictor: keep or drop, from a token and its image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.reduce.stage import Stage
from tokjax.signals import Answers
from tokjax.tokens import Tokens


class KeepPredictor(nn.Module):
  """Log-probabilities (keep, drop) of every free token.

  Half of the features of an embedded token stay its own, the other half are
  averaged over the tokens that are present (Rao et al., 2021; checked against
  models/dyvit.py).
  """

  @nn.compact
  def __call__(
    self, tokens: Tokens, answers: Answers, stage: Stage
  ) -> Float[Array, "b f 2"]:
    del answers
    p = stage.protected
    x = tokens.x[:, p:]
    width = x.shape[-1]
    present = jnp.ones(x.shape[:2], x.dtype)
    if tokens.policy is not None:
      present = tokens.policy[:, p:].astype(x.dtype)
    if tokens.mask is not None:
      real = tokens.mask[:, p:]
      present = jnp.where(real, present, 0.0)
      x = jnp.where(real[..., None], x, 0.0)
    z = nn.gelu(
      nn.Dense(width, name="embed")(nn.LayerNorm(1e-5, name="norm")(x)),
      approximate=False,
    )
    own, shared = jnp.split(z, [width // 2], axis=-1)
    total = jnp.maximum(present.sum(axis=1), 1e-6)[:, None]
    mean = jnp.einsum("bfd,bf->bd", shared, present) / total
    mean = jnp.broadcast_to(mean[:, None], shared.shape)
    z = jnp.concatenate([own, mean], axis=-1)
    for i, size in enumerate((width // 2, width // 4)):
      z = nn.gelu(nn.Dense(size, name=f"hidden_{i}")(z), approximate=False)
    return jax.nn.log_softmax(nn.Dense(2, name="out")(z), axis=-1)
