"""A block of a decoder: attention, its memory, and what is reduced between.

The slots of a block act here. `tokjax.models.decoder` puts blocks together.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jaxtyping import Array, Bool, Float, Int

from tokjax import scores, signals
from tokjax.attention.causal import Causal
from tokjax.cache.kv import KV
from tokjax.layer import Arrivals, Carry, Layer, Memory
from tokjax.models.decoder_answers import DecoderAnswers
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.decoder_layers import GatedMlp, Projections, norm
from tokjax.models.decoder_slots import (
  split_position,
)
from tokjax.models.passage import Passage
from tokjax.models.reducer import Reducer, Reduces
from tokjax.models.unmerged import gathered, spread
from tokjax.signals import Answers
from tokjax.slots import Slots, parameters
from tokjax.tokens import Kind


class Rows(NamedTuple):
  """Tokens on their way through the blocks.

  Attributes:
    x: hidden states, `[b, t, d]`.
    token, position, valid: see `tokjax.layer.Arrivals`.
    kind: of each token, one of `Kind`, `[b, t]`; None: all are TEXT.
    offset: where positions have several axes, of each from `position`,
      `[b, t, a]`; None: there is none, as in a text without images.
    owner: the row of `x` that each of the t tokens has, see
      `tokjax.models.unmerged`; None: its own.
    known: answers to what rules ask about images, token axis behind the batch.
  """

  x: Float[Array, "b t d"]
  token: Int[Array, "b t"]
  position: Int[Array, "b t"]
  valid: Bool[Array, "b t"]
  kind: Int[Array, "b t"] | None = None
  offset: Int[Array, "b t a"] | None = None
  owner: Int[Array, "b t"] | None = None
  known: Answers = Answers()


class Block(Reduces, nn.Module):
  """Norm, attention, norm, MLP; what attention sees and keeps is a slot's.

  Attributes:
    config: the architecture.
    slots: how the slots are filled.
    facts: what slots are told of this block.
    dtype: of activations.
  """

  config: DecoderConfig
  slots: Slots
  facts: Layer
  dtype: Any

  @property
  def layer(self) -> int:
    return self.facts.index

  def setup(self):
    cfg = self.config
    make = lambda: norm(cfg, self.dtype)
    self.norm1, self.norm2 = make(), make()
    if cfg.post_norms:
      self.post_norm1, self.post_norm2 = make(), make()
    self.attention = Projections(cfg, self.dtype, self.slots.adapter_rank)
    self.mlp = GatedMlp(cfg, self.dtype)
    learned = lambda key: parameters(
      attend_of(self.slots), cache_of(self.slots), self.facts, cfg.width, key
    )
    # An entry without arrays would be one more thing in every checkpoint.
    some = jax.tree.leaves(jax.eval_shape(learned, jax.random.key(0)))
    self.params = self.param("slots", learned) if some else {}
    self.setup_reductions()

  def forward(
    self, passage: Passage, carry: Carry, reducer: Reducer
  ) -> tuple[Passage, Carry, Answers]:
    """A whole sequence, of which nothing is remembered."""

    def attend(arrivals):
      return attend_of(self.slots)(
        self.facts,
        arrivals,
        Memory.of(arrivals),
        params=unfreeze(self.params),
        carry=carry,
      )

    return self._through(passage, reducer, attend)

  def prefill(
    self, passage: Passage, state: Any, carry: Carry, last: bool,
    reducer: Reducer,
  ) -> tuple[Passage, tuple[Any, Carry], Answers]:  # fmt: skip
    """A chunk of prompts; returns passage, (state, carry) and answers."""

    def attend(arrivals):
      y, *after = self._taken(arrivals, state, carry, last)
      return y, tuple(after)

    return self._through(passage, reducer, attend)

  def _through(self, passage: Passage, reducer: Reducer, attend):
    """The block, with the reductions at its places."""
    if ahead := reducer.asked_at(self.layer, "input"):
      known = self._known(passage, self._arrive(passage))
      passage = passage.replace(answers=known.add_to(passage.answers, ahead))
    passage = self.reduce_at("input", self.layer, passage, reducer)
    passage = passage.replace(attended=passage.shift)
    arrivals = self._arrive(passage)
    y, after = attend(arrivals)
    if (at := passage.places) is not None:
      y = gathered(y, at.owner, at.mask, passage.tokens.num_tokens)
    collected = Answers()
    asked = reducer.asked_of_attention(self.layer)
    if asked or self.slots.collect:
      known = self._known(passage, arrivals)
      passage = passage.replace(answers=known.add_to(passage.answers, asked))
      collect = [q.answered(self.layer) for q in self.slots.collect]
      collected = known.add_to(collected, collect)
    y = self.attention.output(y)
    y = self.post_norm1(y) if self.config.post_norms else y
    passage = self._added(passage, y, asked, self.norm1)
    passage = self.reduce_at("mlp", self.layer, passage, reducer)
    y = self._mlp_output(passage.tokens.x)
    passage = self._added(passage, y, asked, self.norm2)
    passage = self.reduce_at("output", self.layer, passage, reducer)
    return passage, after, collected

  def _added(self, passage: Passage, y, asked, normed) -> Passage:
    """The passage behind a sub-layer whose output is y.

    Args:
      passage: before it.
      y: `[b, n, d]`.
      asked: questions; those about transitions are answered here.
      normed: the norm of the sub-layer's input.
    """
    tokens, answers = passage.tokens, passage.answers
    depth = self.config.depth
    for question in asked:
      if isinstance(question, signals.Transition) and question.counts(
        self.layer, depth
      ):
        moved = jax.vmap(scores.transition)(normed(tokens.x), y, tokens.mask)
        answers = answers.add(question, answers[question] + moved)
    tokens = tokens.replace(x=tokens.x + y)
    return passage.replace(tokens=tokens, answers=answers)

  def prefill_rows(
    self, rows: Rows, state: Any, carry: Carry, last: bool, gaps: bool
  ) -> tuple[Float[Array, "b t d"], Any, Carry]:
    """`prefill` where nothing is reduced and no rule asks this block.

    `gaps`: as in `Passage`.
    """
    arrivals = dataclasses.replace(self._projected(rows), gaps=gaps)
    y, state, carry = self._taken(arrivals, state, carry, last)
    if rows.owner is not None:
      y = gathered(y, rows.owner, rows.valid, rows.x.shape[1])
    return self._attended(rows.x, y), state, carry

  def _taken(self, arrivals: Arrivals, state: Any, carry: Carry, last: bool):
    """What the cache makes of a chunk of prompts."""
    return cache_of(self.slots).prefill(
      self.facts,
      state,
      arrivals,
      attend=attend_of(self.slots),
      params=unfreeze(self.params),
      carry=carry,
      last=last,
    )

  def decode(
    self, rows: Rows, state: Any, carry: Carry
  ) -> tuple[Float[Array, "b t d"], Any, Carry]:
    """One token of each example, or several; hidden states, state, carry."""
    y, state, carry = cache_of(self.slots).decode(
      self.facts,
      state,
      self._projected(rows),
      attend=attend_of(self.slots),
      params=unfreeze(self.params),
      carry=carry,
    )
    return self._attended(rows.x, y), state, carry

  def _attended(self, x, y):
    """Hidden states behind the block, with the heads' outputs y."""
    y = self.attention.output(y)
    return self._fed(x + (self.post_norm1(y) if self.config.post_norms else y))

  def _known(self, passage: Passage, arrivals: Arrivals) -> DecoderAnswers:
    return DecoderAnswers(
      self.facts, arrivals.clean(), passage.tokens, passage.answers
    )

  def _arrive(self, passage: Passage) -> Arrivals:
    rows = rows_of(passage)
    position, offset = split_position(rows.position)
    rows = rows._replace(position=position, offset=offset)
    arrivals = self._projected(rows)
    gate = passage.tokens.policy
    return dataclasses.replace(arrivals, gaps=passage.gaps, gate=gate)

  def _projected(self, rows: Rows) -> Arrivals:
    y = self.norm1(rows.x)
    q, k, v = self.attention(y)
    x, kind = rows.x, rows.kind
    if kind is None:
      kind = jnp.full(x.shape[:2], Kind.TEXT, jnp.int32)
    if rows.owner is not None:
      q, k, v, y, x, kind = (
        spread(a, rows.owner) for a in (q, k, v, y, x, kind)
      )
    if rows.offset is not None:
      rotary: Any = self.facts.rotary
      q, k = (rotary.by_axis(x, rows.offset) for x in (q, k))
    needs = (*attend_of(self.slots).needs, *cache_of(self.slots).needs)
    return Arrivals(
      q, k, v,
      position=rows.position,
      valid=rows.valid,
      token=rows.token if "token" in needs else None,
      x=y if "x" in needs else None,
      hidden=x if "hidden" in needs else None,
      kind=kind if "kind" in needs else None,
    )  # fmt: skip

  def _fed(self, x):
    """The MLP half of the block."""
    return x + self._mlp_output(x)

  def _mlp_output(self, x):
    """What the MLP adds."""
    y = self.mlp(self.norm2(x))
    return self.post_norm2(y) if self.config.post_norms else y


def rows_of(passage: Passage) -> Rows:
  """What attention is given of a passage; positions are not split."""
  tokens: Any = passage.tokens  # A decoder's always have a mask.
  ids: Any = passage.ids
  if (at := passage.places) is None:
    return Rows(tokens.x, ids, tokens.position, tokens.mask, tokens.kind)
  ids, kind = at.ids, tokens.kind
  return Rows(tokens.x, ids, at.position, at.mask, kind, owner=at.owner)


def attend_of(slots: Slots) -> Any:
  """What fills the slot `attend`; dense attention if nothing does."""
  return Causal() if slots.attend is None else slots.attend


def cache_of(slots: Slots) -> Any:
  """What fills the slot `cache`; the full cache if nothing does."""
  return KV() if slots.cache is None else slots.cache


def positions_of(valid: Bool[Array, "b n"]) -> Int[Array, "b n"]:
  """Places in the text; padding has that of the token before it."""
  return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
