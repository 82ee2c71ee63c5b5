"""Attention to fixed places: sinks, a window, separators."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import layout as layouts
from tokjax import budgets
from tokjax.attention import core
from tokjax.attention.causal import Causal, listed, with_others
from tokjax.budgets import Budget


@dataclasses.dataclass(frozen=True)
class Band(Causal):
  """The first tokens and the last ones: A-shape and similar patterns.

  Attributes:
    first: tokens at the start that all later ones see.
    budget: how many tokens a query sees in all: the first ones and the last
      ones, itself included. What depends on the length of the prompt needs it
      in one chunk.
    dense: so many last real queries of a prompt see everything (tri-shape);
      the prompt then has to come in one chunk.
    reindexed: distances are those within the tokens that are seen, as in a
      cache of first + window tokens that is fed one by one (StreamingLLM):
      beyond that many tokens the first ones stay at a constant distance.
  """

  first: int = 4
  budget: Budget = budgets.Count(516)
  dense: int = 0
  reindexed: bool = False

  def __post_init__(self):
    if self.first < 0 or self.dense < 0:
      raise ValueError(
        f"first={self.first}, dense={self.dense}: must not be negative"
      )
    if self.reindexed and self.dense:
      raise ValueError("reindexed=True with dense: no one place for the query")

  @property
  def whole(self) -> bool:
    return self.dense > 0 or not budgets.fixed(self.budget)

  def with_keep(self, keep: float) -> "Band":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def check(self, layer, prompt):
    total = layer.ask(self.budget.count, prompt)
    if total <= self.first:
      raise ValueError(
        f"budget={self.budget}: shows {total} of {prompt} tokens, no more than"
        f" the first={self.first} ones; raise it or protect fewer"
      )

  def total(self, layer, arrivals):
    """Tokens that queries see in all, `[b]`."""
    of = budgets.counts(self.budget, layer, arrivals.valid)
    return jnp.maximum(of, self.first + 1)

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    early = (memory.position < self.first)[:, None, :]
    window = self.total(layer, arrivals) - self.first
    end = arrivals.valid.sum(axis=1)[:, None] - self.dense

    def rows(at):
      distance = _distances(arrivals, memory, at)
      band = early | (distance < window[:, None, None])
      if self.dense:
        band = band | (at[None] >= end)[:, :, None]
      return causal(at) & band[:, None]

    return rows

  def pattern(self, layer, tokens):
    if self.dense or not budgets.fixed(self.budget):
      return None
    total = layer.ask(self.budget.count, tokens)
    near = layouts.Window(total - self.first - 1)
    early = layouts.Sinks(self.first)
    if self._apart:
      return layouts.Causal() & near & ~early
    return layouts.Causal() & (early | near)

  def shown(self, layer, arrivals, memory):
    seen = self.seen(layer, arrivals, memory)
    if not self._apart:
      return seen
    late = (memory.position >= self.first)[:, None, None]
    return lambda at: seen(at) & late

  @property
  def _apart(self) -> bool:
    """Whether the first tokens meet other queries than the last ones."""
    return self.reindexed and self.first > 0

  def products(self, layer, arrivals, memory):
    near = super().products(layer, arrivals, memory)
    if not self._apart:
      return near
    far = self._far(layer, arrivals, memory)
    m = min(self.first, memory.k.shape[1])
    return lambda at: jnp.concatenate([far(at), near(at)[..., m:]], axis=-1)

  def by_blocks(self, layer, layout, arrivals, memory):
    near = listed(layer, layout, arrivals, memory)
    if not self._apart:
      return near[0]
    return with_others(near, self._early(layer, arrivals, memory))

  def _far(self, layer, arrivals, memory):
    """From query numbers to logits of the first tokens, `[b, g, r, c, m]`.

    Distances to them grow up to the size of the cache only.
    """
    last = self.total(layer, arrivals) - 1
    place = jnp.minimum(arrivals.position, last[:, None])
    q = core.split(layer.rotate(arrivals.q, place), layer.kv_heads)
    k, position = memory.k[:, : self.first], memory.position[:, : self.first]
    k = core.heads_first(layer.rotate(k, position))
    return lambda at: core.logits(layer, q[:, :, :, at], k)

  def _early(self, layer, arrivals, memory):
    """Attention to the first tokens alone: outputs, and log-sum-exps."""
    x = self._far(layer, arrivals, memory)(jnp.arange(arrivals.q.shape[1]))
    k = memory.position[:, : self.first], memory.valid[:, : self.first]
    seen = core.visible(layer, arrivals.position, *k)[:, None, None]
    v = core.heads_first(memory.v[:, : self.first])
    return core.joined_part(x, seen, v)


@dataclasses.dataclass(frozen=True)
class Separators(Causal):
  """The first tokens, the last ones, and all separators between (SepLLM).

  Attributes:
    tokens: ids of separators.
    first: tokens at the start that all later ones see.
    window: how many last tokens a query sees, itself included; what depends
      on the length of the prompt needs it in one chunk.
    dense_layers: these see everything (the H variants).
  """

  tokens: tuple[int, ...] = ()
  first: int = 4
  window: Budget = budgets.Count(256)
  dense_layers: tuple[int, ...] = ()

  @property
  def needs(self) -> tuple[str, ...]:
    return ("token",)

  @property
  def whole(self) -> bool:
    return not budgets.fixed(self.window)

  def with_keep(self, keep: float) -> "Separators":
    return dataclasses.replace(self, window=self.window.with_keep(keep))

  def _dense(self, index: int, depth: int) -> bool:
    return index in self.dense_layers

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    if layer.ask(self._dense):
      return causal
    ids = jnp.asarray(self.tokens, memory.token.dtype)
    always = (memory.position < self.first) | jnp.isin(memory.token, ids)
    window = budgets.counts(self.window, layer, arrivals.valid)

    def rows(at):
      near = _distances(arrivals, memory, at) < window[:, None, None]
      return causal(at) & (always[:, None, :] | near)[:, None]

    return rows


def _distances(arrivals, memory, at):
  """How far keys lie before the queries numbered `at`, `[b, c, n]`."""
  return arrivals.position[:, at][:, :, None] - memory.position[:, None, :]
