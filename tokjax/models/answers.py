"""What an encoder's block answers to the questions of rules."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import signals
from tokjax.attention import dense
from tokjax.signals import Answers, Last, Of, Question
from tokjax.tokens import Kind, Tokens


def query_weights(of: Last | Of, tokens: Tokens) -> Float[Array, "b n"]:
  """How much each query counts in a mean over those that are asked for."""
  real = jnp.ones(tokens.kind.shape, bool)
  real = real if tokens.mask is None else tokens.mask
  if isinstance(of, Last):
    rank = jnp.cumsum(real, axis=-1)
    chosen = real & (rank > rank[:, -1:] - of.count)
  else:
    chosen = real & tokens.of_kind(of.kinds)
    if of.first:
      chosen = chosen & (jnp.cumsum(chosen, axis=-1) == 1)
  weight = chosen.astype(jnp.float32)
  total = weight.sum(axis=-1, keepdims=True)
  return weight / jnp.maximum(total, 1.0)


@dataclasses.dataclass
class EncoderAnswers:
  """Answers of one block about the tokens it was given.

  Attributes:
    layer: index of the block.
    kinds: of the tokens that lead.
    tokens: at the input of its attention.
    q, k, v: projections, `[b, h, n, k]`.
    where: bias, mask and policy, as for the attend slot.
    mapped: whether the attention map has been computed.
  """

  layer: int
  kinds: tuple[Kind, ...]
  tokens: Tokens
  q: Array
  k: Array
  v: Array
  where: dict[str, Any]
  mapped: bool = False

  @functools.cached_property
  def map(self) -> Float[Array, "b h n n"]:
    """The whole attention map."""
    self.mapped = True
    return dense.probabilities(self.q, self.k, **self.where)

  def add_to(self, answers: Answers, asked: Iterable[Question]) -> Answers:
    """The answers with those to more questions, which are of this block."""
    # Those that need the whole map first: the others may then take a row of it.
    needs_map = lambda q: isinstance(q, signals.Attention | signals.Received)
    for question in sorted(asked, key=lambda q: (not needs_map(q), repr(q))):
      answers = answers.add(question, self.answer(question))
    return answers

  def answer(self, question: Question) -> Array:
    """The answer of the batch.

    Raises:
      TypeError: a question that an encoder does not answer.
    """
    match question:
      case signals.Queries():
        return self.q
      case signals.Keys():
        return self.k
      case signals.Values():
        return self.v
      case signals.Hidden():
        return self.tokens.x
      case signals.Derived():
        return question.of_batch(self.tokens)
      case signals.Attention():
        return self.map
      case signals.Received():
        return dense.received(self.map, self.tokens.mask)
      case signals.Rows():
        return signals.reduce_heads(self._rows(question), question.over)
    raise TypeError(f"an encoder does not answer {question}")

  def _rows(self, question: signals.Rows) -> Float[Array, "b h n"]:
    of = question.of
    if question.form == "logits":
      weight = query_weights(of, self.tokens)
      q = jnp.einsum("bhnk,bn->bhk", self.q, weight.astype(self.q.dtype))
      product = jnp.einsum("bhk,bhnk->bhn", q, self.k)
      return product.astype(jnp.float32) * self.q.shape[-1] ** -0.5
    if isinstance(of, Of) and of.first and of.kinds[0] in self.kinds:
      at = self.kinds.index(of.kinds[0])
      # One row is cheap; a policy needs the square map.
      if not self.mapped and self.tokens.policy is None:
        q = self.q[:, :, at : at + 1]
        return dense.probabilities(q, self.k, **self.where)[:, :, 0]
      return self.map[:, :, at]
    weight = query_weights(of, self.tokens)
    return jnp.einsum("bhmn,bm->bhn", self.map, weight)
