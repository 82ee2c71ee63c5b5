"""A decoder with a recipe as two compiled programs: prefill and decode steps.

`ask` and `read` measure with them: answers to probes, likelihood of text.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.sweeps.language_models import LanguageModel
from experiments.sweeps.probes import Probe
from experiments.sweeps.subject import Job, Unfit
from tokjax.models import Generator, generation


class Shape(NamedTuple):
  """Of a batch: examples, tokens of a prompt, steps after it."""

  batch: int
  prompt: int
  steps: int


class Answers(NamedTuple):
  """What a model answers at each step, `[b, steps]`.

  Attributes:
    token: the most probable token.
    loss: of the expected token, in nats.
  """

  token: jax.Array
  loss: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
  """A recipe on one language model, compiled for one shape.

  Attributes:
    params: the weights.
    shape: of the batch.
    prefill: `(params, tokens [b, n], length [b]) -> leaves`, those of a
      `tokjax.models.generation.Generation`.
    decode: `(params, leaves, fed [b, steps], expected [b, steps]) -> Answers`.
    logical: `(leaves) -> bytes that count, [b]`.
    physical: bytes allocated for the batch.
  """

  params: Any
  shape: Shape
  prefill: Any
  decode: Any
  logical: Any
  physical: int

  def start(self, tokens: np.ndarray, length: np.ndarray) -> list[jax.Array]:
    """The leaves after the prompts of a batch."""
    return self.prefill(self.params, jnp.asarray(tokens), jnp.asarray(length))

  def steps(
    self, leaves: list[jax.Array], fed: np.ndarray, expected: np.ndarray
  ) -> Answers:
    """Answers at the steps after that."""
    fed, expected = jnp.asarray(fed), jnp.asarray(expected)
    return self.decode(self.params, leaves, fed, expected)


def compile_one(lm: LanguageModel, job: Job, shape: Shape) -> Program:
  """Builds the model with the recipe and compiles both programs.

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
  of = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
  text, fed = of(*shape[:2]), of(shape.batch, shape.steps)
  notes: list[Any] = []
  first = jax.jit(functools.partial(_prefill, model, shape.steps, notes))
  lowered = first.lower(params, text, of(shape.batch))
  leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in lowered.out_info]
  tree, of_states = notes[-1]
  decode = jax.jit(functools.partial(_decode, model, tree))
  logical = jax.jit(functools.partial(_logical, generator, tree))
  return Program(
    params,
    shape,
    lowered.compile(),
    decode.lower(params, leaves, fed, fed).compile(),
    logical.lower(leaves).compile(),
    sum(x.size * x.dtype.itemsize for x in leaves[:of_states]),
  )


def _prefill(model, steps, notes, params, tokens, length):
  """The leaves; notes their tree, and how many of the first are states."""
  going = generation.prefill(model, params, tokens, length, steps)
  leaves, tree = jax.tree.flatten(going)
  notes.append((tree, len(jax.tree.leaves(going.states))))
  return leaves


def _decode(model, tree, params, leaves, fed, expected):
  going = tree.unflatten(leaves)

  def step(going, at):
    fed, expected = at
    going = generation.decode_step(model, params, going, fed)
    loss = optax.softmax_cross_entropy_with_integer_labels(
      going.logits, jnp.maximum(expected, 0)
    )
    return going, Answers(going.logits.argmax(-1), loss)

  _, answers = jax.lax.scan(step, going, (fed.T, expected.T))
  return jax.tree.map(jnp.transpose, answers)


def _logical(generator, tree, leaves):
  return generator.bytes(tree.unflatten(leaves)).logical


def ask(program: Program, probes: Sequence[Probe]) -> np.ndarray:
  """Share of right answers to every probe, `[probes]`."""
  out = []
  size = program.shape.batch
  for begin in range(0, len(probes), size):
    part = list(probes[begin : begin + size])
    real = len(part)
    part += part[:1] * (size - real)
    prompts = [probe.prompt for probe in part]
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((size, program.shape.prompt), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    fed = np.array([probe.asked for probe in part], np.int32)
    expected = np.array([probe.answer for probe in part], np.int32)
    answers = program.steps(program.start(tokens, length), fed, expected)
    given = np.asarray(answers.token)
    out += [p.share_of(row) for p, row in zip(part, given, strict=True)][:real]
  return np.array(out)


def read(program: Program, windows: np.ndarray) -> np.ndarray:
  """Nats per token of every text after its prompt, `[texts]`.

  Args:
    program: compiled for prompts and steps that together are the windows.
    windows: `[texts, prompt + steps + 1]`; the token after the prompt is fed,
      not counted, since no cache is read to predict it.
  """
  size, n, _ = program.shape
  losses = []
  for begin in range(0, len(windows) - size + 1, size):
    part = windows[begin : begin + size].astype(np.int32)
    leaves = program.start(part[:, :n], np.full(size, n, np.int32))
    answers = program.steps(leaves, part[:, n:-1], part[:, n + 1 :])
    losses.append(np.asarray(answers.loss).mean(axis=1))
  return np.concatenate(losses)
