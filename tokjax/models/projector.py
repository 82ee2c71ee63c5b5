"""From visual features to the width of a language model.

The projector is a tower of one block: reductions act at its input, on the
features of the vision tower, or at its output, on embeddings of the language
model.
"""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import PRNGKeyArray

from tokjax import signals
from tokjax.models import faults
from tokjax.models import vlm_tower as tower
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.passage import Passage
from tokjax.models.reducer import Reduces
from tokjax.slots import Slots
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
  """Two linear layers with an activation between.

  Attributes:
    width: of the language model.
    activation: one of `tokjax.models.activations.ACTIVATIONS`.
    bias: whether the layers have one.
  """

  width: int
  activation: str = "gelu"
  bias: bool = True

  def __post_init__(self):
    faults.check(faults.integers(self, ("width",), 1))
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation={self.activation!r}: must be one of {sorted(ACTIVATIONS)}"
      )


class Projector(Reduces, nn.Module):
  """A multi-layer perceptron over visual tokens, built with slots.

  Attributes:
    config: the architecture.
    slots: what a recipe returned for this tower.
    dtype: of activations.
  """

  config: ProjectorConfig
  slots: Slots = Slots()
  dtype: Any = None

  def __post_init__(self):
    super().__post_init__()
    what, answers = "a projector", signals.OF_TOKENS
    tower.check_slots(self.slots, what, tower.PLACES, answers)

  def setup(self):
    cfg = self.config
    layer = lambda: nn.Dense(cfg.width, use_bias=cfg.bias, dtype=self.dtype)
    self.linear1, self.linear2 = layer(), layer()
    self.setup_reductions()

  def __call__(
    self,
    tokens: Tokens,
    *,
    front: int = 0,
    grid: tuple[int, ...] | None = None,
    key: PRNGKeyArray | None = None,
  ) -> Tokens:
    """Visual tokens of width d to tokens of the language model's width.

    Args:
      tokens: `[k, n, d]`, of k images.
      front: so many at the head are no patches, and no reduction touches them.
      grid: sides of the grid that the patches form; None: none.
      key: for recipes that are random.
    """
    passage, reducer = tower.start(self.slots, tokens, front, grid, key)
    known = passage.answers
    for question in tower.asked(self.slots):
      known = known.add(question, tower.of_tokens(question, tokens))
    passage = passage.replace(answers=known)
    passage = self.reduce_at("input", 0, passage, reducer)
    passage = self._projected(passage)
    passage = self.reduce_at("output", 0, passage, reducer)
    self.sow("intermediates", "plans", passage.plans)
    return passage.tokens

  def _projected(self, passage: Passage) -> Passage:
    tokens = passage.tokens
    x = ACTIVATIONS[self.config.activation](self.linear1(tokens.x))
    return passage.replace(tokens=tokens.replace(x=self.linear2(x)))
