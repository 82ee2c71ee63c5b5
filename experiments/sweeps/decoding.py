"""A decoder with a recipe as two compiled programs: prefill and decode steps.

`Program.ask` answers probes with them. Where a recipe compresses what a dense
prefill leaves, its prefill begins with a record of that, which is computed once
for all of them; see `experiments.sweeps.dense_prefill`.
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

from experiments.sweeps import dense_prefill
from experiments.sweeps.compiled import Compiled, Compiler, Shapes
from experiments.sweeps.language_models import LanguageModel
from experiments.sweeps.probe import OWN, Probe
from experiments.sweeps.subject import Job, Unfit
from tokjax.models import Generator, generation
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

  token: jax.Array
  loss: jax.Array


# The states of all blocks, and the generation without them.
State = tuple[tuple[Any, ...], Generation]


@dataclasses.dataclass(frozen=True)
class Program:
  """A recipe on one language model, compiled for one shape.

  Attributes:
    params: the weights.
    shape: of the batch.
    states: for each layer, from what a dense prefill recorded to the state of
      the recipe's cache; None: the recipe has a prefill of its own.
    prefill: that one, `(params, tokens [b, n], length [b]) -> State`.
    decode: `(params, State, fed, expected, count) -> Answers`.
    generator: for the cache's size.
  """

  params: Any
  shape: Shape
  states: list[Compiled] | None
  prefill: Compiled | None
  decode: Compiled
  generator: Generator

  @property
  def shared(self) -> bool:
    """Whether it begins with the record of a dense prefill."""
    return self.states is not None

  @property
  def identity(self) -> tuple[str, ...]:
    """Equal for programs that compute the same."""
    parts = [*(self.states or ()), self.prefill, self.decode]
    return tuple(part.program.key for part in parts if part is not None)

  def start(
    self, params: Any, batch: Batch, record: State
  ) -> tuple[State, float]:
    """The state after the prompts of a batch, and the seconds it took.

    Args:
      params: the weights.
      batch: the prompts.
      record: what their dense prefill left, for programs that share it.
    """
    if self.prefill is not None:
      return timed(self.prefill, params, batch.tokens, batch.length)
    states, rest = record
    compress = lambda: tuple(
      make(found) for make, found in zip(self.states or [], states, strict=True)
    )
    made, seconds = timed(compress)
    return (made, rest), seconds

  def answer(self, params: Any, state: State, batch: Batch):
    """Answers at the steps after that, and the seconds they took."""
    answers, seconds = timed(
      self.decode, params, *state, batch.fed, batch.expected,
      np.int32(batch.count),
    )  # fmt: skip
    return jax.tree.map(np.asarray, answers), seconds

  def bytes(self, state: State) -> tuple[np.ndarray, float]:
    """Bytes that count, of each example, and bytes allocated for one."""
    size = self.generator.bytes(whole_of(state))
    return np.asarray(size.logical), size.physical / self.shape.batch


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
  """What a program returns, and the seconds it took."""
  begin = time.perf_counter()
  out = jax.block_until_ready(fn(*args))
  return out, time.perf_counter() - begin


def compile_dense(
  lm: LanguageModel, shape: Shape, compiler: Compiler
) -> Compiled:
  """The prefill of the plain model; its states are `dense_prefill.Recorded`."""
  return _prefill(lm.build(dense_prefill.RECORDING), lm.params, shape, compiler)


def compile_one(
  lm: LanguageModel, job: Job, shape: Shape, dense: Compiled, compiler: Compiler
) -> Program:
  """Builds the model with the recipe and compiles both programs.

  Args:
    lm: the language model.
    job: the recipe.
    shape: of batches.
    dense: the recorded prefill of the same model and shape.
    compiler: of all programs.

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
  states = prefill = None
  if dense_prefill.shares(model.slots):
    recorded, rest = dense.out.parts
    states = dense_prefill.compile_states(
      model, recorded, shape.steps, compiler
    )
    state = _joined([made.out for made in states]), rest
  else:
    prefill = _prefill(model, params, shape, compiler)
    state = prefill.out.parts
  steps = _ints(shape.batch, shape.steps)
  decode = compiler(
    functools.partial(_decode, model), Shapes.of(params), *state, steps, steps,
    _ints(),
  )  # fmt: skip
  return Program(params, shape, states, prefill, decode, generator)


def whole_of(state: State) -> Generation:
  """The generation with its states."""
  states, rest = state
  return dataclasses.replace(rest, states=states)


def _prefill(model, params, shape: Shape, compiler: Compiler) -> Compiled:
  def run(params, tokens, length) -> State:
    made = generation.prefill(model, params, tokens, length, shape.steps)
    return made.states, dataclasses.replace(made, states=())

  prompt = _ints(*shape[:2]), _ints(shape.batch)
  return compiler(run, Shapes.of(params), *prompt)


def _joined(parts: Sequence[Shapes]) -> Shapes:
  """Shapes of a tuple of these."""
  leaves = [x for part in parts for x in part.leaves]
  tree = jax.tree_util.treedef_tuple([part.tree for part in parts])
  return Shapes(leaves, tree)


def _decode(model, params, states, rest, fed, expected, count) -> Answers:
  """`count` steps; where `OWN` is fed, the model's last answer is."""

  def step(i, carried):
    state, answers = carried
    given = jax.lax.dynamic_index_in_dim(fed, i, 1, keepdims=False)
    own = state.logits.argmax(-1).astype(given.dtype)
    token = jnp.where(given == OWN, own, given)
    state = generation.decode_step(model, params, state, token)
    wanted = jax.lax.dynamic_index_in_dim(expected, i, 1, keepdims=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(
      state.logits, jnp.maximum(wanted, 0)
    )
    new = Answers(state.logits.argmax(-1).astype(jnp.int32), loss)
    put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 1)
    return state, jax.tree.map(put, answers, new)

  empty = Answers(
    jnp.zeros(fed.shape, jnp.int32), jnp.zeros(fed.shape, jnp.float32)
  )
  state = whole_of((states, rest))
  return jax.lax.fori_loop(0, count, step, (state, empty))[1]


def _ints(*size: int) -> Shapes:
  return Shapes.of(jax.ShapeDtypeStruct(size, jnp.int32))
