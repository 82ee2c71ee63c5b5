"""From visual features to the width of a language model.

The projector is a tower of one block: reductions act at its input, on the
features of the vision tower, or at its output, on embeddings of the language
model.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
from jaxtyping import PRNGKeyArray

from tokjax import signals
from tokjax.models import faults
from tokjax.models import vlm_tower as tower
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.decoder_layers import RMSNorm
from tokjax.models.passage import Passage
from tokjax.models.reducer import Reduces
from tokjax.slots import Slots
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
  """Two or three linear layers with an activation between.

  Attributes:
    width: of the language model.
    hidden: features behind the first layer; None: `width`.
    layers: 2, or 3 of which the last goes from `width` to `width`.
    norm: of features before the layers: "layer", or "rms" without a mean and a
      bias.
    parts: equal parts of the features that are normed each by itself: patches
      that are merged.
    epsilon: of the norm.
    activation: one of `tokjax.models.activations.ACTIVATIONS`.
    bias: whether the layers have one.
  """

  width: int
  activation: str = "gelu"
  bias: bool = True
  hidden: int | None = None
  layers: Literal[2, 3] = 2
  norm: Literal["none", "layer", "rms"] = "none"
  parts: int = 1
  epsilon: float = 1e-6

  def __post_init__(self):
    sizes = ("width", "parts") + (("hidden",) if self.hidden else ())
    faults.check(faults.integers(self, sizes, 1))
    faults.check(faults.positives(self, ("epsilon",)))
    if self.layers not in (2, 3):
      raise ValueError(f"layers={self.layers!r}: must be 2 or 3")
    if self.norm not in ("none", "layer", "rms"):
      raise ValueError(
        f"norm={self.norm!r}: must be 'none', 'layer' or 'rms'"
      )
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
    layer = lambda width: nn.Dense(width, use_bias=cfg.bias, dtype=self.dtype)
    self.linear1 = layer(cfg.hidden or cfg.width)
    self.linear2 = layer(cfg.width)
    if cfg.layers == 3:
      self.linear3 = layer(cfg.width)
    if cfg.norm == "layer":
      self.norm = nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype)
    elif cfg.norm == "rms":
      self.norm = RMSNorm(cfg.epsilon, False, self.dtype)
    self.setup_reductions()

  def __call__(
    self,
    tokens: Tokens,
    *,
    front: int = 0,
    grid: tuple[int, ...] | None = None,
    key: PRNGKeyArray | None = None,
    idle: bool = False,
  ) -> Tokens:
    """Visual tokens of width d to tokens of the language model's width.

    Args:
      tokens: `[k, n, d]`, of k images.
      front: so many at the head are no patches, and no reduction touches them.
      grid: sides of the grid that the patches form; None: none.
      key: for recipes that are random.
      idle: images may be too small for a reduction to act.
    """
    passage, reducer = tower.start(self.slots, tokens, front, grid, key, idle)
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
    tokens, cfg = passage.tokens, self.config
    x = tokens.x
    if cfg.norm != "none":
      k, n, d = x.shape
      x = self.norm(x.reshape(k, n, cfg.parts, d // cfg.parts))
      x = x.reshape(k, n, d)
    act = ACTIVATIONS[cfg.activation]
    x = self.linear2(act(self.linear1(x)))
    if cfg.layers == 3:
      x = self.linear3(act(x))
    return passage.replace(tokens=tokens.replace(x=x))
