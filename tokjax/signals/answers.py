"""Answers to questions, which travel through plans with the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tokjax.plan import Plan
from tokjax.signals.questions import Question


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers to questions, in pairs.

  Attributes:
    questions: with absolute layers (static: questions are no keys of a
      pytree, whose keys are sorted).
    values: an array each; leading axis: the batch, or none for one example.
  """

  questions: tuple[Question, ...] = dataclasses.field(
    default=(), metadata={"static": True}
  )
  values: tuple[Array, ...] = ()

  def __post_init__(self):
    if len(set(self.questions)) < len(self.questions):
      raise ValueError(f"a question is answered twice: {self.questions}")

  def __contains__(self, question: Question) -> bool:
    return question in self.questions

  def __getitem__(self, question: Question) -> Array:
    return self.values[self.questions.index(question)]

  def of(self, kind: type[Question]) -> Array:
    """The answer to the only question of a kind.

    Raises:
      ValueError: there is none, or there are several.
    """
    found = [q for q in self.questions if type(q) is kind]
    if len(found) != 1:
      raise ValueError(
        f"{len(found)} questions {kind.__name__} are answered: {found}"
      )
    return self[found[0]]

  def add(self, question: Question, value: Array) -> "Answers":
    """With one more answer, or another answer to a question."""
    pairs = zip(self.questions, self.values, strict=True)
    kept = [*(p for p in pairs if p[0] != question), (question, value)]
    return Answers(tuple(q for q, _ in kept), tuple(v for _, v in kept))

  def only(self, wanted: set[Question] | frozenset[Question]) -> "Answers":
    """Those that are still wanted."""
    pairs = zip(self.questions, self.values, strict=True)
    kept = [(q, v) for q, v in pairs if q in wanted]
    return Answers(tuple(q for q, _ in kept), tuple(v for _, v in kept))

  def moved(self, plan: Plan) -> "Answers":
    """Of one example: what the outputs of a plan take from their anchors."""

    def move(question, value):
      for axis in question.axes:
        value = jnp.moveaxis(
          plan.take(jnp.moveaxis(value, axis, 0)), 0, axis
        )
      return value

    values = map(move, self.questions, self.values)
    return dataclasses.replace(self, values=tuple(values))


def reduce_heads(x: Array, over: str | None, axis: int = -2) -> Array:
  """Mean, sum or maximum over the axis of heads; None: the array itself."""
  if over is None:
    return x
  return {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[over](x, axis=axis)
