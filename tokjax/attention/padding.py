"""Moves padding behind the real tokens, and results back to their places.

Attention of a decoder counts by place: blocks of a causal layout, first and
last tokens, distances, the end of a text. All of that is right for any mask if
padding comes last (see `tokjax.layer.Arrivals`). A model that takes
masks of any form therefore orders its tokens once, before the first layer, and
undoes that behind the last one; no layer has to know about it.
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Int, Shaped

from tokjax import selection
from tokjax.attention import core


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RealFirst:
  """An order of tokens: the real ones first, as they came, then padding.

  Attributes:
    index: the token that goes to each place, `[b, n]`.
    inverse: the place where each token went, `[b, n]`.
  """

  index: Int[Array, "b n"]
  inverse: Int[Array, "b n"]

  @classmethod
  def of(cls, valid: Bool[Array, "b n"]) -> "RealFirst":
    """The order for a mask of any form: left padding, holes, or a suffix."""
    return cls(*jax.vmap(selection.partition)(valid))

  def apply(self, x: Shaped[Array, "b n ..."]) -> Shaped[Array, "b n ..."]:
    """Tokens in this order."""
    return core.taken(x, self.index)

  def undo(self, x: Shaped[Array, "b n ..."]) -> Shaped[Array, "b n ..."]:
    """Results of ordered tokens, back at the places of the tokens."""
    return core.taken(x, self.inverse)
