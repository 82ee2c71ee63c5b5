"""A decoder with a recipe: prefill and decode steps over batches of probes.

Where a recipe compresses what a dense prefill leaves, its prefill begins with a
record of that, which is computed once for all of them; see
`experiments.sweeps.dense_prefill`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import small_prompts
from experiments.sweeps import dense_prefill
from experiments.sweeps.language_models import LanguageModel
from experiments.sweeps.lowered import Shapes, joined, key_of
from experiments.sweeps.probe import OWN, Probe
from experiments.sweeps.subject import Job, Unfit
from experiments.training import config
from tokjax.models import Decoder, Generator, generation, prefill
from tokjax.models.generation import Generation


class Shape(NamedTuple):
  """Of a batch: examples, tokens of a prompt, the most steps after it."""

  batch: int
  prompt: int
  steps: int


class Batch(NamedTuple):
  """Probes as arrays.

  Attributes:
    tokens, length: prompts `[b, n]`, padded at their end, and their lengths.
    fed, expected: see `Probe`, `[b, steps]`.
    count: how many steps are taken, at most `steps`.
  """

  tokens: np.ndarray
  length: np.ndarray
  fed: np.ndarray
  expected: np.ndarray
  count: int

  @classmethod
  def of(cls, probes: Sequence[Probe], shape: Shape) -> "Batch":
    """Pads to the shape; missing probes are the first one again."""
    part = [*probes, *probes[:1] * (shape.batch - len(probes))]
    tokens = np.zeros(shape[:2], np.int32)
    fed = np.zeros((shape.batch, shape.steps), np.int32)
    expected = np.full(fed.shape, -1, np.int32)
    for i, probe in enumerate(part):
      tokens[i, : len(probe.prompt)] = probe.prompt
      fed[i, : len(probe.asked)] = probe.asked
      expected[i, : len(probe.asked)] = probe.answer
    length = np.array([len(probe.prompt) for probe in part], np.int32)
    count = max(len(probe.asked) for probe in part)
    return cls(tokens, length, fed, expected, count)


class Answers(NamedTuple):
  """What a model answers at each step, `[b, steps]`.

  Attributes:
    token: the most probable token.
    loss: of the expected token, in nats.
  """

  token: Any
  loss: Any


# The states of all blocks, and the generation without them.
State = tuple[tuple[Any, ...], Generation]


@dataclasses.dataclass(frozen=True)
class Dense:
  """The prefill of the plain model; its states are `dense_prefill.Recorded`.

  Attributes:
    model: with the recording cache.
    shape: of batches.
    out: shapes of what it leaves.
  """

  model: Decoder
  shape: Shape
  out: Shapes

  @classmethod
  def of(cls, lm: LanguageModel, shape: Shape) -> "Dense":
    """For batches of a shape."""
    model = lm.build(dense_prefill.RECORDING)
    return cls(model, shape, _prefill_of(model, lm.params, shape)[1])

  def __call__(self, params: Any, batch: Batch) -> State:
    """What prompts leave."""
    return _prefill(self.model, self.shape, params, batch.tokens, batch.length)


@dataclasses.dataclass(frozen=True)
class Program:
  """A recipe on one language model, for batches of one shape.

  The compiled programs are those of the model's blocks, which the first batch
  compiles: `tokjax.models.decoder_programs`.

  Attributes:
    shape: of the batch.
    compress: for a layer, from what a dense prefill recorded to the state of
      the recipe's cache; None: the recipe has a prefill of its own.
    generator: the model with the recipe.
    identity: equal for programs that compute the same.
  """

  shape: Shape
  compress: dense_prefill.Compress | None
  generator: Generator
  identity: tuple[str, ...]

  @property
  def shared(self) -> bool:
    """Whether it begins with the record of a dense prefill."""
    return self.compress is not None

  def start(
    self, params: Any, batch: Batch, record: State
  ) -> tuple[State, float]:
    """The state after the prompts of a batch, and the seconds it took.

    Args:
      params: the weights.
      batch: the prompts.
      record: what their dense prefill left, for programs that share it.
    """
    compress = self.compress
    if compress is None:
      return timed(
        _prefill, self.generator.model, self.shape, params, batch.tokens,
        batch.length,
      )  # fmt: skip
    states, rest = record
    made, seconds = timed(
      lambda: tuple(compress(i, found) for i, found in enumerate(states))
    )
    return (made, rest), seconds

  def answer(self, params: Any, state: State, batch: Batch):
    """Answers at the steps after that, and the seconds they took.

    Where `OWN` is fed, the model's last answer is.
    """
    # Steps take the buffers of states over, and there may be other questions.
    states, rest = jax.tree.map(jnp.copy, state)
    going, model = whole_of((states, rest)), self.generator.model
    jax.block_until_ready(going)
    said, begin = [], time.perf_counter()
    for i in range(batch.count):
      token = _fed(going.logits, batch.fed[:, i])
      going = generation.decode_step(model, params, going, token)
      said.append(_answers(going.logits, batch.expected[:, i]))
    jax.block_until_ready(said)
    seconds = time.perf_counter() - begin
    out = Answers(
      np.zeros(batch.fed.shape, np.int32), np.zeros(batch.fed.shape, np.float32)
    )
    for i, answers in enumerate(said):
      for x, new in zip(out, answers, strict=True):
        x[:, i] = new
    return out, seconds

  def bytes(self, state: State) -> tuple[np.ndarray, float]:
    """Bytes that count, of each example, and bytes allocated for one."""
    size = self.generator.bytes(whole_of(state))
    return np.asarray(size.logical), size.physical / self.shape.batch


@jax.jit
def _fed(logits, given):
  return jnp.where(given == OWN, logits.argmax(-1).astype(given.dtype), given)


@jax.jit
def _answers(logits, wanted) -> Answers:
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.maximum(wanted, 0)
  )
  return Answers(logits.argmax(-1).astype(jnp.int32), loss)


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
  """What a program returns, and the seconds it took."""
  begin = time.perf_counter()
  out = jax.block_until_ready(fn(*args))
  return out, time.perf_counter() - begin


def fitted(lm: LanguageModel, job: Job, shape: Shape) -> tuple[Job, str]:
  """A recipe that fits prompts of this length, and in words what was changed.

  See `small_prompts.fitted`. Options that the sweep was given stay.

  Raises:
    Unfit: the model cannot be built with the recipe, or not for this shape.
  """

  def check(slots):
    prefill.check(lm.build(slots), shape.prompt, shape.steps, None)

  try:
    recipe, note = small_prompts.fitted(
      config.Recipe(job.method, job.keep, options=job.options), check
    )
  except ValueError as error:
    raise Unfit(job, str(error)) from error
  return dataclasses.replace(job, options=tuple(recipe.options)), note


def build(lm: LanguageModel, job: Job, shape: Shape, dense: Dense) -> Program:
  """Builds the model with the recipe; traces it, and compiles nothing.

  Args:
    lm: the language model.
    job: the recipe.
    shape: of batches.
    dense: the recorded prefill of the same model and shape.

  Raises:
    Unfit: the model cannot be built with the recipe, or not for this shape.
  """
  try:
    model = lm.build(job.slots())
    params = lm.params_for(model)
    generator = Generator(
      model, params, capacity=shape.prompt, decode=shape.steps
    )
  except ValueError as error:
    raise Unfit(job, str(error)) from error
  compress = None
  if dense_prefill.shares(model.slots):
    recorded, rest = dense.out.parts
    compress = dense_prefill.Compress.of(model, recorded, shape.steps)
    keys, states = compress.keys_of(recorded)
    state = joined(states), rest
  else:
    key, out = _prefill_of(model, params, shape)
    keys, state = (key,), out.parts
  key, _ = key_of(
    functools.partial(_step, model), Shapes.of(params), *state,
    _ints(shape.batch),
  )  # fmt: skip
  return Program(shape, compress, generator, (*keys, key))


def whole_of(state: State) -> Generation:
  """The generation with its states."""
  states, rest = state
  return dataclasses.replace(rest, states=states)


def _prefill(model: Decoder, shape: Shape, params, tokens, length) -> State:
  made = generation.prefill(model, params, tokens, length, shape.steps)
  return made.states, dataclasses.replace(made, states=())


def _prefill_of(model: Decoder, params, shape: Shape) -> tuple[str, Shapes]:
  prompt = _ints(*shape[:2]), _ints(shape.batch)
  run = functools.partial(_prefill, model, shape)
  return key_of(run, Shapes.of(params), *prompt)


def _step(model: Decoder, params, states, rest, token) -> Generation:
  return generation.decode_step(model, params, whole_of((states, rest)), token)


def _ints(*size: int) -> Shapes:
  return Shapes.of(jax.ShapeDtypeStruct(size, jnp.int32))
