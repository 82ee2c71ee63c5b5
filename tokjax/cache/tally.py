"""Entries that add up what heads attended to, for those who read it later."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import signals
from tokjax.cache.answers import REMEMBERED
from tokjax.cache.entries import Entries
from tokjax.cache.trim import Trim
from tokjax.layer import Layer
from tokjax.signals import Question


@dataclasses.dataclass(frozen=True)
class Tally(Trim):
  """Evicts nothing; entries remember what heads attended to.

  The sum over the heads of a group, of the prompt's last token and of every
  step since. `attended` reads it.

  Attributes:
    since: the first layer that does, as a fraction of the depth: a number for
      each entry is stored in the others in vain.
  """

  remember: Question | None = signals.Rows(of=signals.Last(), over="sum")
  after: bool = True
  since: float = 0.0

  evicts = False

  def remembered(self, layer: Layer) -> Question | None:
    acts = layer.ask(lambda index, depth: index >= int(self.since * depth))
    return self.remember if acts else None


def attended(
  entries: Entries, tokens: int, heads: int
) -> Float[Array, "b n"]:
  """What a `Tally` adds up, by positions in the prompt; mean over heads.

  Args:
    entries: of one layer, which keep their positions.
    tokens: of the prompt, at most.
    heads: query heads of the layer.
  """

  def one(e: Entries) -> Array:
    at = jnp.where(e.valid, e.position, tokens)
    return jnp.zeros((tokens,)).at[at].add(e.extra[REMEMBERED], mode="drop")

  return jax.vmap(jax.vmap(one))(entries).sum(axis=1) / heads
