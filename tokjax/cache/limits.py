"""How many entries prompts of each length may keep at a layer of a cache.

In a sliding layer the candidates are the entries that the prompt's last token
sees, and budgets are counted from these: a fraction is one of the window. First
tokens are protected as long as they are in sight. A budget that is below what
is protected there, but not in a layer without a window, is raised to it, as it
is for short prompts.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tokjax import budgets
from tokjax.layer import Layer
from tokjax.reduce.reduction import Reduce


@dataclasses.dataclass(frozen=True)
class Limits:
  """What prompts up to a length are entitled to at a layer, of all lengths.

  Attributes:
    count: entries that stay, the protected included, `[tokens + 1]`, where
      `tokens` are those of the longest prompt that are in sight.
    last: how many last ones are protected, `[tokens + 1]`.
    first: how many first ones are.
    slides: the layer has a window, so that the first ones may be out of sight.
    merges: what goes becomes one entry more.
  """

  count: np.ndarray
  last: np.ndarray
  first: int
  slides: bool
  merges: bool

  @classmethod
  def of(cls, reduce: Reduce, layer: Layer, prompt: int) -> "Limits":
    prompt = layer.in_sight(prompt)
    free = reduce.free
    last = layer.ask(budgets.table, budgets.of(free.last), prompt)
    count = layer.ask(budgets.table, reduce.budget, prompt)
    length = np.arange(prompt + 1)
    count = np.where(count == budgets.NOTHING, length, count)
    if free.inside:
      count = np.maximum(count, free.first + last)
    else:
      count = count + free.first + last
    slides, merges = layer.window is not None, reduce.rest == "mean"
    return cls(count, last, free.first, slides, merges)

  def at(
    self, length: Int[Array, "b"]
  ) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
    """What prompts may keep, and how many last ones are protected."""
    length = jnp.minimum(length, len(self.count) - 1)
    return jnp.asarray(self.count)[length], jnp.asarray(self.last)[length]

  @property
  def ends(self) -> np.ndarray:
    """Protected entries of prompts of each length."""
    return np.minimum(self.first + self.last, np.arange(len(self.last)))

  @property
  def most(self) -> int:
    """The largest number any of those prompts is entitled to."""
    return int(self.count.max())

  @property
  def free(self) -> int:
    """Room for entries that are not protected."""
    length = np.arange(len(self.count))
    ends = np.minimum(self.last, length) if self.slides else self.ends
    return int((np.minimum(self.count, length) - ends).max())

  @property
  def room(self) -> int:
    """Places for the kept entries of any of those prompts."""
    return min(self.most + self.merges, len(self.count) - 1)
