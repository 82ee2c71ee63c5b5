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
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.reducer import Passage, Reducer, Reduces
from tokjax.reduce.stages import Sequence, Stages, plan_stages
from tokjax.signals import Answers, Question
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

CARRIES = ("reduce",)
PLACES = ("input", "output")


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
    check_slots(self.slots)

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
    stages = stages_of(self.slots, tokens.num_tokens - front, front, grid)
    masked = tokens.mask is not None
    reducer = Reducer.create(
      self.slots, stages, len(tokens.x), masked=masked, ragged=masked, key=key
    )
    passage = reducer.start(tokens).replace(plans=((),))
    known = answers_of(tokens, self.slots)
    passage = passage.replace(answers=known)
    passage = self.reduce_at("input", 0, passage, reducer)
    passage = self._projected(passage)
    return self.reduce_at("output", 0, passage, reducer).tokens

  def _projected(self, passage: Passage) -> Passage:
    tokens = passage.tokens
    x = ACTIVATIONS[self.config.activation](self.linear1(tokens.x))
    return passage.replace(tokens=tokens.replace(x=self.linear2(x)))


def answers_of(tokens: Tokens, slots: Slots) -> Answers:
  """Answers about the tokens at the input, which travel to the output."""
  answers = Answers()
  for question in asked(slots):
    match question:
      case signals.Hidden():
        value = tokens.x
      case signals.Derived():
        value = question.of_batch(tokens)
      case _:
        raise TypeError(f"a projector does not answer {question}")
    answers = answers.add(question, value)
  return answers


def asked(slots: Slots) -> tuple[Question, ...]:
  """Questions that its reductions ask of the projector."""
  every = [q for reduce in slots.reduce for q in reduce.asks]
  own = [q for q in every if not isinstance(q, signals.OF_THE_CALL)]
  return tuple(dict.fromkeys(q.answered(0) for q in own))


def stages_of(
  slots: Slots, patches: int, front: int, grid: tuple[int, ...] | None
) -> Stages:
  """Its reductions, for so many patches behind so many other tokens."""
  sequence = Sequence(((Kind.PATCH, patches),), patches + front, front, grid)
  return plan_stages(slots.reduce, sequence, 1, recipe=slots.name)


def check_slots(slots: Slots) -> None:
  """Raises ValueError for slots that a projector cannot carry out."""
  slots.refuse_foreign(CARRIES, "a projector")
  for reduce in slots.reduce:
    where = f"recipe {slots.name!r}, slot 'reduce': {reduce.recipe or 'a rule'}"
    if reduce.at not in PLACES:
      raise ValueError(
        f"{where} acts at {reduce.at!r}; a projector carries out reductions at"
        f" {' and '.join(PLACES)}"
      )
    if reduce.back or reduce.again or reduce.soft or reduce.position != "keep":
      raise ValueError(
        f"{where} gives tokens back, renumbers, starts again or trains softly;"
        " a projector only reduces"
      )
    if Kind.PATCH not in reduce.free.kinds:
      raise ValueError(
        f"{where} reduces {[k.name for k in reduce.free.kinds]} tokens; a"
        " projector has free tokens of the kind PATCH"
      )
    for question in reduce.asks:
      if not isinstance(
        question, (signals.Hidden, signals.Derived, *signals.OF_THE_CALL)
      ):
        raise ValueError(
          f"{where} asks {type(question).__name__}, and a projector has no"
          " attention; use the recipe within the vision tower"
        )
