"""A vision-language model with a recipe, compiled for batches of questions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from experiments.sweeps.question_models import Asked, QuestionModel
from experiments.sweeps.subject import Job, Unfit
from tokjax.analysis import cost
from tokjax.models import (
  VisionLanguage,
  VisionLanguageGenerator,
  generation,
  vlm_generation,
  vlm_prompts,
)
from tokjax.models.decoder_slots import Capacities
from tokjax.models.generation import Generation
from tokjax.models.vlm import Prompts


class Packed(NamedTuple):
  """A batch of questions as one shape.

  Attributes:
    prompts: on the device.
    room: the most tokens of each kind (static).
    real: how many rows are no filling.
  """

  prompts: Prompts
  room: Capacities
  real: int


@dataclasses.dataclass(frozen=True)
class Program:
  """A model with a recipe, whose prefill is one compiled program.

  Attributes:
    job: what was compiled.
    generator: the model.
    batches: all questions, packed for it.
    run: from parameters, prompts and a key to a `Generation`.
    cost: of the prefill of a batch, vision and selection included, by the
      compiler's own analysis.
  """

  job: Job
  generator: VisionLanguageGenerator
  batches: Sequence[Packed]
  run: Callable[..., Generation]
  cost: cost.Cost

  def step(self, params: Any, going: Generation, token) -> Generation:
    """A step of decoding; `going` is used up."""
    decoder = self.generator.model.decoder
    return generation.decode_step(decoder, params["language"], going, token)

  def decode(
    self, params: Any, going: Generation, count: int
  ) -> list[jax.Array]:
    """The first `count` tokens of each answer, without sampling."""
    tokens = [going.logits.argmax(-1).astype(jnp.int32)]
    for _ in range(count - 1):
      going = self.step(params, going, tokens[-1])
      tokens.append(going.logits.argmax(-1).astype(jnp.int32))
    return tokens


def build(source: QuestionModel, job: Job, size: int, room: int) -> Program:
  """Builds the model with a recipe, and compiles its prefill.

  The prompt has as many tokens as the longest one of all questions needs.

  Args:
    source: the model and the questions.
    job: the recipe.
    size: of batches.
    room: tokens that can be generated.

  Raises:
    Unfit: the model cannot be built with the recipe at this keep ratio.
  """
  asked = source.asked
  try:
    model = source.build(job.slots())
    if model.slots.draft is not None:
      raise ValueError(
        "guesses tokens, and removes none from a prompt; see"
        " tokjax.models.Speculative and scripts/learned_drafts.py"
      )
    generator = generator_of(model, source, asked, size, room)
    batches = [
      pack(generator, asked[first : first + size], size)
      for first in range(0, len(asked), size)
    ]
    first = batches[0]
    leaves, tree = jax.tree.flatten(first.prompts)

    def prefill(params, leaves, key):
      prompts = tree.unflatten(leaves)
      return vlm_generation.prefill(
        model, params, prompts, room, None, first.room, key
      )

    jitted = jax.jit(prefill)
    inputs = source.params, leaves, jax.random.key(0)
    compiled = jitted.lower(*inputs).compile()
  except ValueError as error:
    raise Unfit(job, str(error)) from error
  except flax.errors.ScopeParamNotFoundError as error:
    raise Unfit(
      job, "has weights, which the model was not trained with; see"
      " configs/learned/questions.py",
    ) from error  # fmt: skip
  spent = cost.measure(jitted, *inputs, compiled=compiled)
  run = lambda params, prompts, key: compiled(
    params, jax.tree.leaves(prompts), key
  )
  return Program(job, generator, batches, run, spent)


def generator_of(
  model: VisionLanguage,
  source: QuestionModel,
  asked: Sequence[Asked],
  size: int,
  decode: int = 1,
) -> VisionLanguageGenerator:
  """A generator with room for the longest prompt, which all are padded to.

  Args:
    model: built with the slots of a recipe.
    source: of its parameters.
    asked: all questions.
    size: of batches.
    decode: tokens that can be generated.
  """
  count = vlm_generation.tokens_per_image(model.config, model.slots)
  cut = lambda one: vlm_prompts.crops_of(one.image, model.config).pixels
  crops = [len(cut(one)) for one in asked]
  # Where images are cut, a newline ends each row of each crop at most.
  most, each = max(crops), count * 2 if model.config.pinpoints else count
  longest = max(len(one.prompt) for one in asked) - 1 + most * each
  return VisionLanguageGenerator(
    model, source.params, longest, decode, buckets=(longest,),
    image_buckets=(most, most * size),
  )  # fmt: skip


def pack(
  generator: VisionLanguageGenerator, asked: Sequence[Asked], size: int
) -> Packed:
  """A batch of `size` questions, filled up with the first of them."""
  rows = [*asked, *(asked[:1] * (size - len(asked)))]
  prompts, room = generator.pack(
    [one.prompt for one in rows], [[one.image] for one in rows]
  )
  return Packed(prompts, room, len(asked))
