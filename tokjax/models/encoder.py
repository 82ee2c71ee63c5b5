"""The transformer encoder with its two slots.

A block is: [reduce before_block] -> norm -> attention, in or around which a
reduction may act -> [reduce after_attention] -> norm -> MLP. Every place is
one line of `Block.__call__`; what happens there is a plan.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from tokjax.attention import dense
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.reducer import (
  Reducer,
  build_stages,
  key_bias,
  merge_map,
  needs_of_block,
  restore_all,
  restore_batch,
  take_rows,
)
from tokjax.plan import move_batch
from tokjax.reduce.reduction import Slots
from tokjax.reduce.stage import Stage
from tokjax.tokens import Signals, Tokens


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


class LowRank(nn.Module):
  """LoRA: a trainable update of low rank that starts at zero."""

  width: int
  rank: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    dense = lambda size, name, init: nn.Dense(
      size, use_bias=False, dtype=self.dtype, kernel_init=init, name=name
    )
    # Kaiming's with a = sqrt(5), as PyTorch initialises linear layers.
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    down = dense(self.rank, "down", init)(x)
    return dense(self.width, "up", nn.initializers.zeros)(down)


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


class Block(nn.Module):
  """One pre-norm transformer block; `stages` are its reductions."""

  width: int
  heads: int
  mlp_dim: int
  activation: str
  epsilon: float
  qkv_bias: bool
  layer_scale: bool
  slots: Slots
  stages: tuple[Stage, ...]
  needs: tuple[str, ...]
  protected: int
  grid: tuple[int, int] | None
  dtype: Any

  def setup(self):
    def norm():
      return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype)

    self.norm1, self.norm2 = norm(), norm()
    self.attention = Attention(
      self.width,
      self.heads,
      self.qkv_bias,
      self.dtype,
      self.slots.attend,
      self.slots.adapter_rank,
    )
    self.mlp = Mlp(self.mlp_dim, self.activation, self.dtype)
    self.learned = [
      s.reduce.learned and s.reduce.learned.clone(parent=None)
      for s in self.stages
    ]
    if self.layer_scale:
      ones = nn.initializers.ones
      self.scale1 = self.param("scale1", ones, (self.width,))
      self.scale2 = self.param("scale2", ones, (self.width,))

  def __call__(self, tokens: Tokens, previous: Signals, reducer: Reducer):
    """Returns the tokens, this block's signals and the plans it made."""
    tokens, plans = self._reduce("before_block", tokens, previous, reducer)
    tokens, signals, inside = self._attend(tokens, reducer)
    tokens, after = self._reduce("after_attention", tokens, signals, reducer)
    y = self.mlp(self.norm2(tokens.x))
    tokens = tokens.replace(x=tokens.x + self._scaled(y, "scale2"))
    return tokens, signals, plans + inside + after

  def _at(self, where: str) -> list[tuple[int, Stage]]:
    return [(i, s) for i, s in enumerate(self.stages) if s.reduce.at == where]

  def _scaled(self, y, name):
    if not self.layer_scale:
      return y
    return y * getattr(self, name).astype(y.dtype)[None, None]

  def _reduce(self, where, tokens, signals, reducer):
    """Carries out the stages at one place."""
    plans = []
    for i, stage in self._at(where):
      signals = self._ask(i, stage, tokens, signals)
      if reducer.soft(stage):
        tokens = reducer.soften(stage, tokens, signals)
        continue
      plan = reducer(stage, tokens, signals)
      tokens = self._move(i, stage, plan, tokens)
      plans.append(plan)
    return tokens, plans

  def _ask(self, i, stage, tokens, signals):
    """Lets the stage's own module speak."""
    if stage.reduce.learned is None:
      return signals
    learned = self.learned[i](tokens, signals, stage)
    return dataclasses.replace(signals, learned=learned)

  def _move(self, i, stage, plan, tokens):
    if hasattr(stage.reduce.learned, "modulate"):
      tokens = self.learned[i].modulate(tokens, plan, stage)
    return move_batch(plan, tokens)

  def _attend(self, tokens: Tokens, reducer):
    """The attention half of the block, with the reductions inside it."""
    if self._at("around_attention"):
      return self._attend_around(tokens, reducer)
    x = self.attention.inputs(tokens.x, self.protected, self.grid)
    q, k, v = self.attention.project(self.norm1(x))
    where = self._where(tokens)
    signals, weight = self._signals(tokens, q, k, v, where)
    plans = []
    if inside := self._at("attention_rows"):
      ((i, stage),) = inside
      plans = [reducer(stage, tokens, self._ask(i, stage, tokens, signals))]
      q = take_rows(plans[0], q)
      y = self.attention.attend(q, k, v, **where)
      tokens = self._move(i, stage, plans[0], tokens)
    elif inside := self._at("attention_map"):
      ((i, stage),) = inside
      plans = [reducer(stage, tokens, self._ask(i, stage, tokens, signals))]
      tokens = self._move(i, stage, plans[0], tokens)
      values = self.attention.values(self.norm1(tokens.x))
      y = dense.mix(merge_map(plans[0], weight), values)
    elif weight is not None and self.slots.attend is None:
      y = dense.mix(weight, v)
    else:
      y = self.attention.attend(q, k, v, **where)
    y = self._scaled(self.attention.output(y), "scale1")
    return tokens.replace(x=tokens.x + y), signals, plans

  def _where(self, tokens) -> dict[str, Array | None]:
    """What the attend slot is told besides queries, keys and values."""
    bias = key_bias(tokens) if self.slots.proportional else None
    where = {"bias": bias, "mask": tokens.mask}
    if tokens.policy is not None:
      where["policy"] = tokens.policy
    return where

  def _attend_around(self, tokens, reducer):
    """Reduce, attend, restore: the residual keeps every token."""
    ((i, stage),) = self._at("around_attention")
    hidden = Signals(hidden_before=tokens.x)
    plan = reducer(stage, tokens, self._ask(i, stage, tokens, hidden))
    few = move_batch(plan, tokens.replace(x=self.norm1(tokens.x)))
    q, k, v = self.attention.project(few.x)
    y = self.attention.attend(q, k, v, **self._where(few))
    y = self._scaled(self.attention.output(y), "scale1")
    y = restore_batch(plan, y)
    return tokens.replace(x=tokens.x + y), hidden, [plan]

  def _signals(self, tokens, q, k, v, where):
    """The signals that recipes asked for, and the whole map if one did."""
    need = self.needs
    weight = row = received = None
    if "attention" in need or "received_attention" in need:
      weight = dense.probabilities(q, k, **where)
      received = dense.received(weight, tokens.mask)
    if "class_attention" in need:
      # One row is cheap; a policy needs the square map.
      if weight is None and tokens.policy is None:
        row = dense.probabilities(q[:, :, :1], k, **where)[:, :, 0]
      else:
        whole = dense.probabilities(q, k, **where) if weight is None else weight
        row = whole[:, :, 0]
    signals = Signals(
      queries=q if "queries" in need else None,
      keys=k if "keys" in need else None,
      values=v if "values" in need else None,
      attention=weight if "attention" in need else None,
      class_attention=row,
      received_attention=received if "received_attention" in need else None,
      hidden_before=tokens.x if "hidden_before" in need else None,
    )
    return signals, weight


class Encoder(nn.Module):
  """A stack of blocks; a reduction is scheduled by block and place.

  Attributes:
    protected: number of leading tokens that no plan touches.
    slots: the recipe. Other attributes: the architecture.
  """

  depth: int
  width: int
  heads: int
  mlp_dim: int
  activation: str
  epsilon: float
  qkv_bias: bool
  layer_scale: bool
  slots: Slots
  protected: int
  dtype: Any

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    *,
    grid: tuple[int, int],
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Tokens, dict[str, Any]]:
    """Tokens `[b, n, d]` to `[b, m, d]`.

    The second result holds "plans" (a list for each block), "signals" (for
    each block, those that the recipe collects), and where a recipe trains
    softly for each stage "kept" (the differentiable share of tokens that are
    present, `[b]`) and "scheduled" (the share it is to keep).
    """
    if tokens.mask is not None:
      # A product with what is not real would be NaN if that were: 0 * NaN.
      real = tokens.mask[:, :, None]
      tokens = tokens.replace(x=jnp.where(real, tokens.x, 0.0))
    free, front = tokens.num_tokens - self.protected, self.protected
    stages = build_stages(self.slots, free, self.depth, front, grid)
    reducer = Reducer.create(
      self.slots, tokens.mask, len(tokens.x), front, key, train
    )
    signals, whole = Signals(), None
    plans, kept, scheduled, collected = [], [], [], []
    for i in range(self.depth):
      if whole is None and any(s.reduce.restore for s in stages[i]):
        whole = (i, tokens)
      full = tokens.num_tokens == free + front
      tokens, signals, made = Block(
        width=self.width,
        heads=self.heads,
        mlp_dim=self.mlp_dim,
        activation=self.activation,
        epsilon=self.epsilon,
        qkv_bias=self.qkv_bias,
        layer_scale=self.layer_scale,
        slots=self.slots,
        stages=stages[i],
        needs=needs_of_block(self.slots, stages, i),
        protected=front,
        grid=grid if full else None,
        dtype=self.dtype,
        name=f"block_{i}",
      )(tokens, signals, reducer)
      plans.append(made)
      collected.append(signals)
      if any(reducer.soft(s) for s in stages[i]):
        kept.append(tokens.policy[:, front:].mean(axis=1))
        scheduled.append(stages[i][-1].keep / free)
    if whole is not None:
      tokens = restore_all(tokens, plans, *whole)
    out = {"plans": plans, "kept": kept, "scheduled": scheduled}
    return tokens, out | {"signals": collected if self.slots.collect else []}
