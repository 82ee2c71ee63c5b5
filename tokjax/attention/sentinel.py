"""Sentinel tokens: one behind each chunk of text sees that chunk alone (2024).

Chunks end with a token that the data puts there (`landmark.with_landmarks`
does). A sentinel sees its own chunk and itself, so that it can only summarise
it; other tokens see all that came before, sentinels included. Nothing is
removed. Luo et al., 2024 (arXiv 2406.10985): the abstract and the mask of its
Figure 1; how long chunks are, and whether a sentinel sees earlier ones, is not
told.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from tokjax.attention.causal import Causal


@dataclasses.dataclass(frozen=True)
class Sentinels(Causal):
  """See the module. While decoding, every token sees everything.

  Attributes:
    tokens: ids of sentinels.
    earlier: whether a sentinel also sees the sentinels before it.
  """

  tokens: tuple[int, ...] = ()
  earlier: bool = False

  def __post_init__(self):
    wrong = [token for token in self.tokens if token < 0]
    if wrong:
      raise ValueError(f"tokens={self.tokens}: ids must be 0 or more")

  @property
  def needs(self) -> tuple[str, ...]:
    return ("token",)

  def _marks(self, token: Int[Array, "b n"]):
    return jnp.isin(token, jnp.asarray(self.tokens, token.dtype))

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    mark = self._marks(memory.token) & memory.valid
    # Sentinels before each key: the number of its chunk.
    chunk = jnp.cumsum(mark, axis=1) - mark
    asks = self._marks(arrivals.token)

    def rows(at):
      position = arrivals.position[:, at]
      before = memory.position[:, None] < position[:, :, None]
      own = (mark[:, None] & before).sum(axis=-1, keepdims=True)
      may = chunk[:, None] == own
      if self.earlier:
        may = may | mark[:, None]
      return causal(at) & (may | ~asks[:, at][:, :, None])[:, None]

    return rows
