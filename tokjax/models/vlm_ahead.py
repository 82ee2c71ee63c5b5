"""The block of an encoder behind the features that a language model takes.

LLaVA takes the features before the last block of CLIP. Some methods ask that
block, which does not run, what it would attend to: its norm and its queries,
keys and values are all that is computed, and only if they are asked for.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, PRNGKeyArray

from tokjax.models import vlm_tower as tower
from tokjax.models.answers import EncoderAnswers
from tokjax.models.encoder import Attention, EncoderConfig
from tokjax.models.reducer import Reduces
from tokjax.plan import Plan
from tokjax.signals import Question
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens


class Ahead(Reduces, nn.Module):
  """Reductions at the input of a block that runs no further.

  Attributes:
    config: of the encoder.
    slots: what a recipe returned for this tower.
    dtype: of activations.
  """

  config: EncoderConfig
  slots: Slots = Slots()
  dtype: Any = None

  def __post_init__(self):
    super().__post_init__()
    what = "the block ahead of the features"
    tower.check_slots(self.slots, what, ("input",), tower.ANSWERS)
    tower.check_kinds(self.slots, {*self.config.kinds, Kind.PATCH})

  def setup(self):
    cfg = self.config
    self.norm1 = nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype)
    self.attention = Attention(cfg.width, cfg.heads, cfg.qkv_bias, self.dtype)
    self.setup_reductions()

  def __call__(
    self,
    tokens: Tokens,
    *,
    grid: tuple[int, ...] | None = None,
    key: PRNGKeyArray | None = None,
  ) -> tuple[Tokens, tuple[Plan, ...]]:
    """Those of the features that remain, and the plans that say which.

    Args:
      tokens: features, those of `config.kinds` in front, `[k, n, d]`.
      grid: sides of the grid that the patches form; None: none.
      key: for recipes that are random.
    """
    if not self.slots.reduce and not self.is_initializing():
      return tokens, ()
    front = len(self.config.kinds)
    passage, reducer = tower.start(self.slots, tokens, front, grid, key)
    known = self._known(tokens)
    answers = known.add_to(passage.answers, tower.asked(self.slots))
    passage = passage.replace(answers=answers)
    passage = self.reduce_at("input", 0, passage, reducer)
    self.sow("intermediates", "plans", passage.plans)
    return passage.tokens, passage.plans[-1]

  def answer(self, tokens: Tokens, question: Question) -> Array:
    """The answer about features, before anything is reduced.

    Args:
      tokens: as in a call.
      question: one of `vlm_tower.ANSWERS`.
    """
    return self._known(tokens).answer(question)

  def _known(self, tokens: Tokens) -> EncoderAnswers:
    q, k, v = self.attention.project(self.norm1(tokens.x))
    where = {"bias": None, "mask": tokens.mask}
    return EncoderAnswers(0, self.config.kinds, tokens, q, k, v, where)
