"""What a decoder's block answers to the questions of rules.

Attention is that of exact causal attention, whatever fills the attend slot.
Queries go in blocks, so that no array has two long axes, unless a rule asks for
the whole map.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import signals
from tokjax.attention import core
from tokjax.layer import Arrivals, Layer
from tokjax.models.answers import query_weights
from tokjax.models.decoder_slots import split_position
from tokjax.signals import Answers, By, Last, Question
from tokjax.tokens import Kind, Tokens


@dataclasses.dataclass(frozen=True)
class DecoderAnswers:
  """Answers of one block about the tokens it was given.

  Attributes:
    layer: static facts.
    arrivals: queries, keys and values before rotation, zeros in padding.
    tokens: at the block's input.
    known: answers of earlier blocks, for questions about these.
  """

  layer: Layer
  arrivals: Arrivals
  tokens: Tokens
  known: Answers

  def add_to(self, answers: Answers, asked: Iterable[Question]) -> Answers:
    """The answers with those to more questions, which are of this block."""
    # Questions about answers come after those that they are about.
    rests = lambda q: isinstance(getattr(q, "of", None), By)
    for question in sorted(asked, key=lambda q: (rests(q), repr(q))):
      told = dataclasses.replace(self, known=answers)
      answers = answers.add(question, told.answer(question))
    return answers

  def answer(self, question: Question) -> Array:
    """The answer of the batch; heads are query heads.

    Raises:
      TypeError: a question that a decoder does not answer.
    """
    a = self.arrivals
    match question:
      case signals.Queries():
        return core.heads_first(a.q)
      case signals.Keys():
        k = self.layer.rotate(a.k, a.position) if question.rotated else a.k
        return core.heads_first(k)
      case signals.Values():
        return core.heads_first(a.v)
      case signals.Hidden():
        return self.tokens.x
      case signals.Derived():
        return question.of_batch(self.tokens)
      case signals.Seen() | signals.Origin() | signals.Merged():
        return self.known[question]
      case signals.Recalled():
        nothing = jnp.zeros(a.valid.shape, jnp.float32)
        return self.known[question] if question in self.known else nothing
      case signals.Transition():
        # What a block adds is known behind its sub-layers.
        zero = jnp.zeros(a.valid.shape, jnp.float32)
        return self.known[question] if question in self.known else zero
      case signals.Attention():
        whole = core.over_rows(self._rows_at, a.q.shape[1])
        return jnp.moveaxis(whole, 1, 2)
      case signals.Received():
        every = signals.Of(tuple(Kind))
        return self._weighted(query_weights(every, self.tokens))
      case signals.Peaks():
        return self._peaks(self.known[question.of.signal] > 0)
      case signals.Rows():
        return signals.reduce_heads(self._rows(question), question.over)
    raise TypeError(f"a decoder does not answer {question}")

  def _rows(self, question: signals.Rows) -> Float[Array, "b h n"]:
    of = question.of
    if question.form == "logits":
      if not isinstance(of, Last):
        raise TypeError(f"{question}: logits are those of the last queries")
      return self._products(self._last(of)[0]).mean(axis=2)
    if isinstance(of, Last):
      q, at, real = self._last(of)
      weight = self._softmax(q, at, real)
      count = jnp.maximum(real.sum(axis=1), 1)[:, None, None]
      return weight.sum(axis=2) / count
    if isinstance(of, By):
      mass = jnp.where(self.tokens.mask, self.known[of.signal], 0.0)
      total = mass.sum(axis=-1, keepdims=True)
      mass = mass / jnp.where(total > 0, total, 1.0)
      return self._weighted(mass, divided=question.form == "by_rotation")
    return self._weighted(query_weights(of, self.tokens))

  def _last(self, of: Last):
    """Rotated queries of the last real tokens `[b, w, H, D]`, their places."""
    valid = self.arrivals.valid
    n = valid.shape[1]
    end = valid.sum(axis=1, dtype=jnp.int32)[:, None]
    at = end - min(of.count, n) + jnp.arange(min(of.count, n))[None]
    real, at = at >= 0, jnp.maximum(at, 0)
    position = core.taken(self.arrivals.position, at)
    q = self.layer.rotate(core.taken(self.arrivals.q, at), position)
    return q, position, real

  @property
  def _keys(self) -> Float[Array, "b g n d"]:
    a = self.arrivals
    return core.heads_first(self.layer.rotate(a.k, a.position))

  @property
  def _rotated_ones(self) -> Float[Array, "b n d"]:
    """A head of ones at the place of every token."""
    a = self.arrivals
    ones = jnp.ones((*a.position.shape, 1, a.k.shape[-1]), jnp.float32)
    _, offset = split_position(self.tokens.position)
    if offset is not None:
      rotary: Any = self.layer.rotary
      ones = rotary.by_axis(ones, offset)
    return self.layer.rotate(ones, a.position)[:, :, 0]

  def _products(self, q: Float[Array, "b w h d"]) -> Float[Array, "b h w n"]:
    """Scaled products with all keys, without soft cap and mask."""
    layer = self.layer.replace(soft_cap=None)
    x = core.logits(layer, core.split(q, layer.kv_heads), self._keys)
    return x.reshape(x.shape[0], layer.heads, *x.shape[3:])

  def _softmax(self, q, position, real) -> Float[Array, "b h w n"]:
    layer, a = self.layer, self.arrivals
    x = core.logits(layer, core.split(q, layer.kv_heads), self._keys)
    seen = core.visible(layer, position, a.position, a.valid)
    seen = seen & real[:, :, None]
    weight = core.softmax(x, seen[:, None, None])
    return weight.reshape(x.shape[0], layer.heads, *x.shape[3:])

  def _rows_at(self, at: Int[Array, "c"]) -> Float[Array, "b c h n"]:
    a = self.arrivals
    q = self.layer.rotate(a.q[:, at], a.position[:, at])
    weight = self._softmax(q, a.position[:, at], a.valid[:, at])
    return jnp.moveaxis(weight, 1, 2)

  def _weighted(
    self, weight: Float[Array, "b n"], divided: bool = False
  ) -> Float[Array, "b h n"]:
    """Rows of all queries, summed by weight, a block of queries at a time.

    Args:
      weight: of each query.
      divided: rows are divided by what rotation alone makes of them.
    """
    n = weight.shape[1]
    ones = self._rotated_ones if divided else None

    def step(total, at):
      # Beyond the last query the weight is zero.
      inside = jnp.minimum(at, n - 1)
      own = jnp.where(at < n, weight[:, inside], 0.0)
      rows = self._rows_at(inside)
      if ones is not None:
        alone = jnp.einsum("bcd,bnd->bcn", ones[:, inside], ones)
        alone = alone[:, :, None] * self.layer.factor
        rows = jnp.where(rows > 0, rows / alone, 0.0)
      return total + jnp.einsum("bchn,bc->bhn", rows, own), None

    zero = jnp.zeros((weight.shape[0], self.layer.heads, n))
    return jax.lax.scan(step, zero, _blocks(n))[0]

  def _peaks(self, chosen: Bool[Array, "b n"]) -> Float[Array, "b n"]:
    """The largest of some rows, mean over heads, a block at a time."""
    n = chosen.shape[1]

    def step(most, at):
      inside = jnp.minimum(at, n - 1)
      rows = self._rows_at(inside).mean(axis=2)
      rows = jnp.where(chosen[:, inside, None], rows, 0.0)
      return jnp.maximum(most, rows.max(axis=1)), None

    return jax.lax.scan(step, jnp.zeros(chosen.shape), _blocks(n))[0]


def _blocks(n: int) -> Int[Array, "i c"]:
  """Places of n queries in blocks; the last one may go beyond them."""
  block = min(core.BLOCK, n)
  blocks = -(-n // block)
  return jnp.arange(blocks * block).reshape(blocks, block)
