"""Text from prompts of text, with any recipe, and what it costs."""

import sys
from collections.abc import Sequence

import jax
import numpy as np

from experiments.drafted import Stream
from experiments.generated import Generated
from experiments.prompts import Answer, Prompt
from experiments.request import Generate
from experiments.small_prompts import fitted
from experiments.sweeps.language_models import LanguageModel, Trained
from experiments.timed_answers import Show, run, warm_up
from experiments.training.config import DTYPES
from experiments.training.eta import working
from tokjax import interop
from tokjax.models import Decoder, Generator, generation, prefill
from tokjax.slots import Slots


def answer(
  config: Generate,
  lm: LanguageModel,
  asked: Sequence[Prompt],
  show: Show | None = None,
) -> list[Generated]:
  """What follows each prompt; of a single one, `show` is given the pieces."""
  ids = [one.encode(lm.tokenizer, config.chat) for one in asked]
  made = build(lm, config, sys.stderr.write)
  made.pack(ids)  # Refused before anything is compiled.
  stream, out = Stream(made, config), []
  for i in range(0, len(asked), config.batch):
    part = ids[i : i + config.batch]
    out += answer_batch(lm, stream, asked[i:], part, show)
  return out


def answer_batch(
  lm: LanguageModel,
  stream: Stream,
  asked: Sequence[Prompt],
  ids: Sequence[Sequence[int]],
  show: Show | None,
) -> list[Generated]:
  """Prompts that are taken together."""
  tokenizer, stop = lm.tokenizer, stream.config.stop
  answers = [Answer(tokenizer.decode, tokenizer.ends, stop) for _ in ids]
  with working("compiling", sys.stderr):
    compiled, sizes = warm_up(stream, ids)
  first, rate = run(stream, answers, show, ids)
  logical = np.broadcast_to(np.asarray(sizes.logical), len(ids))
  full = full_bytes(stream.generator, ids)
  return [
    Generated(
      text.text,
      tuple(text.ids),
      first,
      rate,
      compiled,
      float(logical[i]),
      sizes.physical // len(ids),
      full // len(ids),
      asked[i].text,
      len(ids[i]),
      text.stopped,
      per_step=stream.per_step,
    )
    for i, text in enumerate(answers)
  ]


def refuse_early(
  config: Generate, source: Trained, asked: Sequence[Prompt]
) -> None:
  """Traces the model with its slots and prompts, before it is trained.

  Raises:
    ValueError: what `answer` would raise once the model is there.
  """
  train = source.train
  if train.data.num_classes != 256:
    return
  example = jax.ShapeDtypeStruct((1, min(64, train.model.length)), "int32")
  init = train.build_model().init
  shapes = jax.eval_shape(init, jax.random.key(0), example)["params"]
  lm = LanguageModel(
    train.model, shapes, DTYPES[train.precision], interop.Bytes(), train.data,
    "",
  )  # fmt: skip
  ids = [one.encode(lm.tokenizer, config.chat) for one in asked]
  made = build(lm, config)
  made.pack(ids)
  state_shapes(made, made.model, ids)


def build(
  lm: LanguageModel, config: Generate, say: Show = lambda text: None
) -> Generator:
  """The language model with the recipe's slots, and room.

  Args:
    lm: the model.
    config: with a recipe whose windows may be too large for the capacity.
    say: is told if smaller ones are used.
  """
  capacity = config.capacity or lm.config.length

  def check(slots):
    prefill.check(lm.build(slots), capacity, config.tokens, config.chunk)

  recipe, changed = fitted(config.recipe, check)
  if changed:
    say(f"note: {changed}\n")
  model = lm.build(recipe.slots())
  return Generator(
    model,
    lm.params_for(model),
    capacity=capacity,
    decode=config.tokens,
    chunk=config.chunk,
  )


def full_bytes(made: Generator, ids: Sequence[Sequence[int]]) -> int:
  """Bytes of the full cache in place of the recipe's; nothing is computed."""
  leaves = state_shapes(made, made.model.clone(slots=Slots()), ids)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def state_shapes(
  made: Generator, model: Decoder, ids: Sequence[Sequence[int]]
) -> list[jax.ShapeDtypeStruct]:
  """Of the caches after the prompts; nothing is computed."""
  length = made.bucket(max(len(one) for one in ids))
  shape = jax.ShapeDtypeStruct((len(ids), length), "int32")

  def states(params, tokens, length):
    going = generation.prefill(model, params, tokens, length, made.decode)
    return jax.tree.leaves(going.states)

  lengths = jax.ShapeDtypeStruct((len(ids),), "int32")
  return jax.eval_shape(states, made.params, shape, lengths)
