"""What a rule sees of one example at one place of a model or a cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax import signals
from tokjax.budgets import Budget
from tokjax.plan import Plan
from tokjax.reduce import lift
from tokjax.signals import Answers, Question
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Site:
  """What a rule sees of one example at one place.

  The properties and `site[question]` show free tokens only, `f` of the `n`
  there are; `tokens` and `whole(question)` are complete. Where the protected
  tokens do not lead the sequence, f is n and `mask` says which are free.

  Attributes:
    answers: to the questions of the rule.
    keep: free tokens that remain (static).
    layer, depth: index of this block, number of blocks.
    protected: how many leading tokens take no part.
    due: how many free tokens this example may keep when its batch is padded
      (traced); None: `keep`.
    grid: sides of the grid that the free tokens form, None once they are
      reduced.
    key: random key of this example and block, for rules that ask `Random`.
    free_at: where free tokens are, if they do not simply follow the protected.
    carry: what this rule returned at the site before; a registered dataclass.
    learned: what the recipe's own trained module says; its shape is its own.
    budget: of the reduction, for rules that read more than a number from it.
  """

  tokens: Tokens
  answers: Answers
  keep: int
  layer: int = 0
  depth: int = 1
  protected: int = 0
  due: Int[Array, ""] | None = None
  grid: tuple[int, ...] | None = None
  key: PRNGKeyArray | None = None
  free_at: Bool[Array, "n"] | None = None
  carry: Any = None
  learned: Array | None = None
  budget: Budget | None = None

  @property
  def answering(self) -> int:
    """The index of this block in the questions that are answered."""
    return self.layer

  @property
  def num_free(self) -> int:
    return self.tokens.num_tokens - self.protected

  @property
  def remove(self) -> int:
    return self.num_free - self.keep

  def free(self, values: Array, axis: int = 0) -> Array:
    """The free tokens' part of an array along its token axis."""
    n = values.shape[axis]
    axis = axis % values.ndim
    return jax.lax.slice_in_dim(values, self.protected, n, axis=axis)

  def with_free(self, values: Array, free: Array) -> Array:
    """`values` of all tokens, with those of the free ones replaced."""
    new = values.at[self.protected :].set(free)
    return new if self.free_at is None else jnp.where(self.free_at, new, values)

  @property
  def x(self) -> Float[Array, "f d"]:
    return self.free(self.tokens.x)

  @property
  def size(self) -> Float[Array, "f"]:
    return self.free(self.tokens.size)

  @property
  def position(self) -> Float[Array, "f p"]:
    return self.free(self.tokens.position)

  @property
  def mask(self) -> Bool[Array, "f"] | None:
    if self.free_at is not None:
      return self.free_at
    mask = self.tokens.mask
    return None if mask is None else self.free(mask)

  def whole(self, question: Question) -> Array:
    """The answer for all tokens, the protected ones included.

    Raises:
      ValueError: the question was not asked.
    """
    asked = question.answered(question.at(self.answering, self.depth))
    if asked not in self.answers:
      raise ValueError(
        f"{question} was not asked: attach it to the rule with"
        " tokjax.signals.asks, or bind it as an option"
      )
    return self.answers[asked]

  def __getitem__(self, question: Question) -> Array:
    """The answer for the free tokens; of `Attention` the whole map."""
    value = self.whole(question)
    if len(question.axes) > 1:
      return value
    return self.free(value, question.axes[0])

  def _the(self, name: str, kind: type[Question]) -> Question:
    """The only question of a kind that the rule asks."""
    found = [q for q in self.answers.questions if type(q) is kind]
    if len(found) != 1:
      raise ValueError(
        f"site.{name} is absent: the rule asks {len(found)} questions"
        f" {kind.__name__}; attach one with tokjax.signals.asks"
      )
    return found[0]

  @property
  def keys(self) -> Float[Array, "h f k"]:
    return self[self._the("keys", signals.Keys)]

  @property
  def queries(self) -> Float[Array, "h f k"]:
    return self[self._the("queries", signals.Queries)]

  @property
  def values(self) -> Float[Array, "h f k"]:
    return self[self._the("values", signals.Values)]

  @property
  def class_attention(self) -> Float[Array, "h f"]:
    return self[self._the("class_attention", signals.Rows)]

  @property
  def received_attention(self) -> Float[Array, "h f"]:
    return self[self._the("received_attention", signals.Received)]

  @property
  def attention(self) -> Float[Array, "h n n"]:
    """The whole map, protected tokens included."""
    return self[self._the("attention", signals.Attention)]

  def lift(self, plan: Plan) -> Plan:
    """A plan over tokens behind leading protected ones, as one over all."""
    return lift.leading(plan, self.protected)
