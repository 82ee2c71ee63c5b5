"""Tokens after prompts, with the draft of a recipe where it has one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments import typed
from experiments.request import Generate
from tokjax.models import Generator, Speculative, VisionLanguageGenerator


@dataclasses.dataclass
class Stream:
  """Runs prompts through a generator, or through it and its draft.

  Attributes:
    generator: of the model.
    config: how tokens are drawn.
    steps: of the model since the last prompts.
    tokens: that came out of them.

  Raises:
    ConfigError: a draft is to guess tokens that are drawn.
  """

  generator: Generator | VisionLanguageGenerator
  config: Generate
  steps: int = 0
  tokens: int = 0

  def __post_init__(self):
    slots = self.generator.model.slots
    self._fast = None
    if slots.draft is None:
      return
    temperature = self.config.sampler.temperature
    if temperature:
      raise typed.ConfigError(
        f"sampler.temperature={temperature}: recipe {slots.name!r} has a draft,"
        " which guesses what is most probable; must be 0"
      )
    self._fast = Speculative(self.generator)

  @property
  def per_step(self) -> float | None:
    """Tokens of a step of the model; None: there is no draft."""
    return None if self._fast is None else self.tokens / max(self.steps, 1)

  def __call__(
    self, *inputs: Any, ends: tuple[int, ...] = ()
  ) -> Iterator[np.ndarray]:
    """Tokens `[b]`, -1 behind the end of a text and where a draft was wrong.

    Args:
      *inputs: of the generator's `prefill`.
      ends: tokens that complete a text.
    """
    self.steps = self.tokens = 0
    if self._fast is None:
      sampler, key = self.config.sampler, None
      if sampler.temperature:
        key = jax.random.key(self.config.seed)
      going = self.generator.prefill(*inputs)
      yield from self.generator.stream(
        going, sampler=sampler, key=key, ends=ends
      )
      return
    for given in self._fast.stream(*inputs, ends=ends):
      real = given >= 0
      self.steps += int(real.any(axis=1).sum())
      self.tokens += int(real.sum())
      yield from given.T[real.any(axis=0)]
