"""What is asked of generation: a model, a recipe, and how tokens are drawn."""

import dataclasses
from typing import Annotated, Any

from experiments import typed
from experiments.sweeps.language_models import LANGUAGE_MODELS
from experiments.training.config import Recipe
from tokjax.models import Sampler


@dataclasses.dataclass(frozen=True)
class Generate:
  """What is generated.

  Attributes:
    language_model: the model; "trained" or "pretrained".
    recipe: fills its slots.
    prompt: text that is continued.
    tokens: the largest number of tokens to generate.
    capacity: the longest prompt, in tokens; None: the model's length.
    chunk: tokens of the prompt taken at a time; None: all.
    sampler: how tokens are drawn.
    seed: of the draws.
    chat: the prompt is a user's message, put by the model's chat template.
    stop: texts that end the generated one; they are not part of it.
    batch: prompts of a file that are taken together.
    dataset: of a model of actions, the data set whose scale they have; None:
      there is one only.
  """

  language_model: Annotated[Any, typed.OneOf(LANGUAGE_MODELS)]
  recipe: Recipe = Recipe()
  prompt: str = ""
  tokens: int = 128
  capacity: int | None = None
  chunk: int | None = None
  sampler: Sampler = Sampler()
  seed: int = 0
  chat: bool = False
  stop: tuple[str, ...] = ()
  batch: int = 8
  dataset: str | None = None

  def __post_init__(self):
    for name in ("tokens", "capacity", "chunk", "batch"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value}: must be 1 or more")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed={self.seed}: must be in [0, 2**32)")
    if "" in self.stop:
      raise ValueError(f"stop={self.stop}: a stop string must not be empty")
