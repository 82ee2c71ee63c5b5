"""The transformer encoder with its two slots.

A block is: [reduce at input] -> norm -> attention, in or around which a
reduction may act -> [reduce at mlp] -> norm -> MLP -> [reduce at output].
Every place is one line of `Block.__call__`; what happens there is a plan.
"""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from tokjax.attention import dense
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.adapters import LowRank
from tokjax.models.answers import EncoderAnswers
from tokjax.models.passage import Passage
from tokjax.models.reducer import (
  Reducer,
  Reduces,
  key_bias,
  merge_map,
  restore_batch,
  sequence_of_patches,
  take_rows,
)
from tokjax.plan import move_batch
from tokjax.reduce.stages import plan_stages
from tokjax.signals import Answers
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens


@runtime_checkable
class EncoderConfig(Protocol):
  """What an encoder reads of a model's configuration; see `ViTConfig`."""

  depth: int
  width: int
  heads: int
  mlp_dim: int
  activation: str
  epsilon: float
  qkv_bias: bool
  layer_scale: bool

  @property
  def kinds(self) -> tuple[Kind, ...]: ...


class Mlp(nn.Module):
  """Two dense layers with an activation between."""

  hidden: int
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
    y = ACTIVATIONS[self.activation](y)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)


class Attention(nn.Module):
  """Projections of multi-head attention; heads stand before tokens."""

  width: int
  heads: int
  qkv_bias: bool
  dtype: Any
  implementation: Any = None
  adapter_rank: int = 0

  def setup(self):
    def proj(bias):
      return nn.Dense(self.width, use_bias=bias, dtype=self.dtype)

    self.query = proj(self.qkv_bias)
    self.key = proj(self.qkv_bias)
    self.value = proj(self.qkv_bias)
    self.out = proj(True)
    if self.adapter_rank:
      self.adapt_query, self.adapt_value = (
        LowRank(self.width, self.adapter_rank, self.dtype) for _ in range(2)
      )
    if isinstance(self.implementation, nn.Module):
      self.learned = self.implementation.clone(parent=None)

  def split(self, x):
    b, n, _ = x.shape
    x = x.reshape(b, n, self.heads, self.width // self.heads)
    return x.transpose(0, 2, 1, 3)

  def project(self, x, context=None):
    """Queries of `x`, keys and values of `context` (default x)."""
    context = x if context is None else context
    q = self.query(x)
    if self.adapter_rank:
      q = q + self.adapt_query(x)
    return self.split(q), self.split(self.key(context)), self.values(context)

  def values(self, x):
    v = self.value(x)
    if self.adapter_rank:
      v = v + self.adapt_value(x)
    return self.split(v)

  def attend(self, q, k, v, **where):
    """The slot: `where` holds `bias`, `mask` and, in training, `policy`."""
    attend = self.implementation or dense.Dense()
    if isinstance(attend, nn.Module):
      attend = self.learned
    return attend(q, k, v, **where)

  def inputs(self, x, protected: int, grid):
    """What a learned attention makes of the tokens before they are normed."""
    if hasattr(self.implementation, "inputs"):
      return self.learned.inputs(x, protected, grid)
    return x

  def output(self, y):
    b, _, n, _ = y.shape
    return self.out(y.transpose(0, 2, 1, 3).reshape(b, n, self.width))


class Block(Reduces, nn.Module):
  """One pre-norm transformer block.

  Attributes:
    config: the architecture.
    slots: how the slots are filled.
    layer: index of this block.
    grid: sides of the grid of patches while all are there.
    dtype: of activations.
  """

  config: EncoderConfig
  slots: Slots
  layer: int
  grid: tuple[int, ...] | None
  dtype: Any

  def setup(self):
    cfg = self.config

    def norm():
      return nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype)

    self.norm1, self.norm2 = norm(), norm()
    self.attention = Attention(
      cfg.width,
      cfg.heads,
      cfg.qkv_bias,
      self.dtype,
      self.slots.attend,
      self.slots.adapter_rank,
    )
    self.mlp = Mlp(cfg.mlp_dim, cfg.activation, self.dtype)
    self.setup_reductions()
    if cfg.layer_scale:
      ones = nn.initializers.ones
      self.scale1 = self.param("scale1", ones, (cfg.width,))
      self.scale2 = self.param("scale2", ones, (cfg.width,))

  def __call__(
    self, passage: Passage, reducer: Reducer
  ) -> tuple[Passage, Answers]:
    """The passage behind this block, and the answers that are collected."""
    passage = self._look_ahead(passage, reducer)
    passage = self.reduce_at("input", self.layer, passage, reducer)
    passage, collected = self._attend(passage, reducer)
    passage = self.reduce_at("mlp", self.layer, passage, reducer)
    tokens = passage.tokens
    y = self.mlp(self.norm2(tokens.x))
    tokens = tokens.replace(x=tokens.x + self._scaled(y, "scale2"))
    passage = passage.replace(tokens=tokens)
    return self.reduce_at("output", self.layer, passage, reducer), collected

  def _scaled(self, y, name):
    if not self.config.layer_scale:
      return y
    return y * getattr(self, name).astype(y.dtype)[None, None]

  def _look_ahead(self, passage: Passage, reducer: Reducer) -> Passage:
    """Answers that reductions at the input ask of this very block."""
    asked = reducer.asked_at(self.layer, "input")
    if not asked:
      return passage
    tokens = passage.tokens
    known = self._known(tokens, *self.attention.project(self.norm1(tokens.x)))
    return passage.replace(answers=known.add_to(passage.answers, asked))

  def _known(self, tokens, q, k, v) -> EncoderAnswers:
    return EncoderAnswers(
      self.layer, self.config.kinds, tokens, q, k, v, self._where(tokens)
    )

  def _attend(self, passage: Passage, reducer):
    """The attention half of the block, with the reductions inside it."""
    if any(s.reduce.around for s in reducer.at(self.layer, "attention")):
      return self._attend_around(passage, reducer)
    tokens = passage.tokens
    front = len(self.config.kinds)
    x = self.attention.inputs(tokens.x, front, self.grid)
    q, k, v = self.attention.project(self.norm1(x))
    known = self._known(tokens, q, k, v)
    asked = reducer.asked_of_attention(self.layer)
    passage = passage.replace(answers=known.add_to(passage.answers, asked))
    collect = [
      q.answered(self.layer)
      for q in self.slots.collect
      if q.about(self.layer, self.config.depth)
    ]
    collected = known.add_to(Answers(), collect)
    where = known.where
    if inside := reducer.at(self.layer, "queries"):
      (stage,) = inside
      learned = self.learned_of(stage, passage)
      plan, passage = reducer.plan(stage, passage, learned)
      y = self.attention.attend(take_rows(plan, q), k, v, **where)
      passage = self.move_tokens(stage, plan, passage, reducer)
    elif inside := reducer.at(self.layer, "attention"):
      (stage,) = inside
      weight = known.map
      learned = self.learned_of(stage, passage)
      plan, passage = reducer.plan(stage, passage, learned)
      passage = self.move_tokens(stage, plan, passage, reducer)
      values = self.attention.values(self.norm1(passage.tokens.x))
      y = dense.mix(merge_map(plan, weight), values)
    elif known.mapped and self.slots.attend is None:
      y = dense.mix(known.map, v)
    else:
      y = self.attention.attend(q, k, v, **where)
    y = self._scaled(self.attention.output(y), "scale1")
    tokens = passage.tokens
    return passage.replace(tokens=tokens.replace(x=tokens.x + y)), collected

  def _where(self, tokens) -> dict[str, Array | None]:
    """What the attend slot is told, next to queries, keys and values."""
    bias = key_bias(tokens) if self.slots.proportional else None
    where = {"bias": bias, "mask": tokens.mask}
    if tokens.policy is not None:
      where["policy"] = tokens.policy
    return where

  def _attend_around(self, passage, reducer):
    """Reduce, attend, give back: the residual keeps every token."""
    (stage,) = reducer.at(self.layer, "attention")
    asked = reducer.asked_at(self.layer, "attention")
    tokens = passage.tokens
    if asked:
      known = self._known(tokens, *self.attention.project(self.norm1(tokens.x)))
      passage = passage.replace(answers=known.add_to(passage.answers, asked))
    learned = self.learned_of(stage, passage)
    plan, passage = reducer.plan(stage, passage, learned)
    few = move_batch(plan, tokens.replace(x=self.norm1(tokens.x)))
    q, k, v = self.attention.project(few.x)
    y = self.attention.attend(q, k, v, **self._where(few))
    y = self._scaled(self.attention.output(y), "scale1")
    y = restore_batch(plan, y, stage.reduce.back)
    passage = passage.replace(tokens=tokens.replace(x=tokens.x + y))
    return passage.with_plan(plan), Answers()


class Encoder(nn.Module):
  """A stack of blocks; a reduction is scheduled by block and place.

  Attributes:
    config: the architecture; its `kinds` are those of the leading tokens,
      which no plan touches.
    slots: the recipe.
    dtype: of activations.
  """

  config: EncoderConfig
  slots: Slots
  dtype: Any

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    *,
    grid: tuple[int, ...],
    key: PRNGKeyArray | None = None,
    train: bool = False,
    memory: dict[tuple[int, int], Array] | None = None,
  ) -> tuple[Tokens, dict[str, Any]]:
    """Tokens `[b, n, d]` to `[b, m, d]`.

    The second result holds "plans" (a list for each block), "signals" (for
    each block, the `Answers` that the recipe collects), "memory" (for each
    reduction that fills from a memory, what it left for the next call), and
    where a recipe trains softly for each stage "kept" (the differentiable
    share of tokens that are present, `[b]`) and "scheduled" (the share it is
    to keep).
    """
    if tokens.mask is not None:
      # A product with what is not real would be NaN if that were: 0 * NaN.
      real = tokens.mask[:, :, None]
      tokens = tokens.replace(x=jnp.where(real, tokens.x, 0.0))
    cfg, front = self.config, len(self.config.kinds)
    free = tokens.num_tokens - front
    stages = plan_stages(
      self.slots.reduce, sequence_of_patches(free, front, grid), cfg.depth,
      recipe=self.slots.name, filled=bool(memory),
    )  # fmt: skip
    masked = tokens.mask is not None
    reducer = Reducer.create(
      self.slots, stages, len(tokens.x), masked=masked, ragged=masked, key=key,
      train=train, memory=memory,
    )  # fmt: skip
    passage = reducer.start(tokens)
    kept, scheduled, collected = [], [], []
    for i in range(cfg.depth):
      passage = passage.replace(plans=(*passage.plans, ()))
      full = passage.tokens.num_tokens == free + front
      passage, answers = Block(
        config=cfg,
        slots=self.slots,
        layer=i,
        grid=grid if full else None,
        dtype=self.dtype,
        name=f"block_{i}",
      )(passage, reducer)
      collected.append(answers)
      passage = reducer.give_back(passage, i)
      if any(reducer.soft(s) for s in stages[i]):
        kept.append(passage.tokens.policy[:, front:].mean(axis=1))
        scheduled.append(stages[i][-1].keep / free)
    out = {
      "plans": [list(made) for made in passage.plans],
      "kept": kept,
      "scheduled": scheduled,
      "signals": collected if self.slots.collect else [],
      "memory": passage.memory,
    }
    return passage.tokens, out
