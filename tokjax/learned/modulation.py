"""PYRA: a rank-one modulation of the tokens that are merged away."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tokjax.plan import Assignment
from tokjax.reduce.stage import Stage
from tokjax.signals import Answers
from tokjax.tokens import Tokens


class PairModulation(nn.Module):
  """Scales each merged source by channel and by pair before it merges.

  For the r pairs in rank order, g_i = LN(s_i x_src + s_j x_dst); channels get
  2 sigmoid(w_a^T G), pairs 2 sigmoid(G w_b^T) - 1, and a source becomes
  src + (src * channels) * pair. With w_b = 0, the start, nothing changes
  (Xiong et al., 2024; checked against model/adaptive_merge.py).
  """

  complete = True

  def __call__(self, tokens: Tokens, answers: Answers, stage: Stage) -> None:
    """PYRA matches as ToMe does: there is nothing to say before."""

  @nn.compact
  def modulate(self, tokens: Tokens, plan: Assignment, stage: Stage) -> Tokens:
    """The tokens with their merged sources modulated."""
    del stage
    if not isinstance(plan, Assignment) or plan.rest is None:
      raise ValueError("PairModulation: the rule must merge pairs of tokens")
    width, pairs = tokens.x.shape[-1], plan.rest.shape[-1]
    take = jax.vmap(lambda values, index: values[index])
    target = take(plan.anchor, jnp.minimum(plan.into, plan.num_outputs - 1))
    scaled = tokens.x * tokens.size[..., None].astype(tokens.x.dtype)
    pair = take(scaled, plan.rest) + take(scaled, target)
    pair = nn.LayerNorm(1e-5, name="norm")(pair)
    by_rank = self.param("by_rank", _around_zero, (pairs, 1))
    by_channel = self.param("by_channel", nn.initializers.zeros, (1, width))
    channel = 2 * nn.sigmoid(jnp.einsum("brd,r->bd", pair, by_rank[:, 0]))
    token = 2 * nn.sigmoid(jnp.einsum("brd,d->br", pair, by_channel[0])) - 1
    source = take(tokens.x, plan.rest)
    change = source * channel[:, None] * token[..., None]
    change = change.astype(tokens.x.dtype)
    add = jax.vmap(lambda x, index, change: x.at[index].add(change))
    return tokens.replace(x=add(tokens.x, plan.rest, change))


def _around_zero(key, shape, dtype=jnp.float32):
  """Uniform in (-1, 1): Kaiming's with a = sqrt(5) for a fan-in of one."""
  return jax.random.uniform(key, shape, dtype, -1.0, 1.0)
