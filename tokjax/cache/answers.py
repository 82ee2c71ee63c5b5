"""What a cache answers to the questions of rules: a prompt's, and a step's.

A site is one key head of one example. The heads of an answer are the query
heads that read it; keys and values have one.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from tokjax import signals
from tokjax.cache import scores
from tokjax.cache.entries import Entries
from tokjax.cache.prompt import Prompt, Scorer, over_prompts
from tokjax.cache.workspace import Workspace
from tokjax.layer import Layer
from tokjax.signals import Answers, Last, Question


@dataclasses.dataclass(frozen=True)
class Observed(Question):
  """What a function of a layer's whole prompt says of each head's tokens.

  Attributes:
    fn: from a `Prompt` to `[G, n]`; hashable. See `tokjax.cache.scores`.
    queries: how many last queries it reads; None: all.
    needs: parts of the arrivals that it also reads ("token").
  """

  fn: Scorer | None = None
  queries: int | None = 0
  needs: tuple[str, ...] = ()

  axes: ClassVar = (-1,)


@dataclasses.dataclass(frozen=True)
class Remembered(Question):
  """The score that entries carry with them since the prompt, `[n]`."""

  axes: ClassVar = (-1,)


def queries_of(asked: Iterable[Question]) -> int | None:
  """How many last queries of a prompt have to be held; None: all.

  Raises:
    ValueError: a question that a cache does not answer.
  """
  most, every = 0, False
  for question in asked:
    match question:
      case Observed(queries=None) | signals.Received() | signals.Queries():
        every = True
      case Observed():
        most = max(most, question.queries or 0)
      case signals.Rows(of=Last()):
        most = max(most, question.of.count)
      case signals.Keys() | signals.Values() | Remembered():
        pass
      case _:
        raise ValueError(
          f"a cache does not answer {question}; it answers Rows of Last"
          " queries, Received, Queries, Keys, Values and Observed, of its own"
          " layer"
        )
    if question.layer != 0:
      raise ValueError(
        f"{question}: a cache answers for its own layer only; leave out layer="
      )
  return None if every else most


def needs_of(asked: Iterable[Question]) -> tuple[str, ...]:
  """Parts of the arrivals that questions need."""
  return tuple(sorted({n for q in asked for n in getattr(q, "needs", ())}))


def of_prompt(
  layer: Layer, space: Workspace, asked: Iterable[Question]
) -> Answers:
  """Answers about complete prompts, leading axes `[b, G]`."""
  answers = Answers()
  for question in asked:
    one = lambda prompt, q=question: _of_prompt(prompt, q)
    value = over_prompts(layer, space, one)
    answers = answers.add(question.answered(layer.key), value)
  return answers


def _of_prompt(prompt: Prompt, question: Question) -> Array:
  by_group = lambda x: jnp.swapaxes(x, 0, 1).reshape(
    prompt.layer.kv_heads, -1, x.shape[0], x.shape[2]
  )
  match question:
    case Observed():
      return question.fn(prompt)
    case signals.Keys():
      return by_group(prompt.rotated_k if question.rotated else prompt.k)
    case signals.Values():
      return by_group(prompt.v)
    case signals.Queries():
      return by_group(prompt.q)
    case signals.Received():
      count = jnp.maximum(prompt.length, 1)
      return scores.column_sums(prompt) / count
  return _rows(prompt, question)


def _rows(prompt: Prompt, question: Any) -> Array:
  """Attention of the last queries of a prompt."""
  window = prompt
  if prompt.q.shape[0] > question.of.count:
    window = _cut(prompt, question.of.count)
  count = jnp.maximum(window.q_valid.sum(), 1)
  if question.form == "logits":
    raise ValueError(f"{question}: a cache answers with probabilities")
  mass = scores.column_sums(window) / count
  return signals.reduce_heads(mass, question.over)


def _cut(prompt: Prompt, count: int) -> Prompt:
  """The same with its last queries only, where it holds more."""
  whole = prompt.q.shape[0] == prompt.k.shape[0]
  end = prompt.length if whole else jnp.int32(prompt.q.shape[0])
  at = end - count + jnp.arange(count)
  real, at = at >= 0, jnp.maximum(at, 0)
  return dataclasses.replace(
    prompt, q=prompt.q[at], q_position=prompt.q_position[at],
    q_valid=prompt.q_valid[at] & real,
  )  # fmt: skip


def of_step(
  entries: Entries, asked: Iterable[Question], layer: Layer, weight: Any
) -> Answers:
  """Answers about entries `[b, G, n]` at a step.

  Args:
    entries: what is there.
    asked: the questions.
    layer: where.
    weight: what the step's query attends to, `[b, G, r, 1, n]`; None: nothing
      is known yet.

  Raises:
    ValueError: a question that a step does not answer.
  """
  answers = Answers()
  for question in asked:
    match question:
      case Remembered():
        value = entries.extra[REMEMBERED]
      case signals.Keys(rotated=None):
        value = entries.k[:, :, None]
      case signals.Values():
        value = entries.v[:, :, None]
      case signals.Rows() if weight is not None and question.of == Last():
        value = signals.reduce_heads(weight[:, :, :, 0], question.over)
      case _:
        raise ValueError(step_refuses(question))
    answers = answers.add(question.answered(layer.key), value)
  return answers


def step_refuses(question: Question) -> str:
  """Why a step does not answer a question."""
  return (
    f"{question} is not answered between steps; a step answers Remembered,"
    " Keys(rotated=None), Values and, with after=True, Rows of the last query"
  )


# Among what entries carry with them.
REMEMBERED = "score"
