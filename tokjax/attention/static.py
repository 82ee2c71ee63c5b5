"""Attention to fixed places: sinks, a window, separators."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import layout as layouts
from tokjax.attention import core
from tokjax.attention.causal import Causal
from tokjax.cache import budgets
from tokjax.cache.budgets import Budget


@dataclasses.dataclass(frozen=True)
class Band(Causal):
  """The first tokens and the last ones: A-shape, and its relatives.

  Attributes:
    first: tokens at the start that all later ones see.
    budget: how many tokens a query sees in all: beside the first ones the
      last ones, itself included. What depends on the length of the prompt
      needs it in one chunk.
    dense: so many last real queries of a prompt see everything (tri-shape);
      the prompt then has to come in one chunk.
    reindexed: distances are those within the tokens that are seen, as where a
      cache of first + window tokens is fed one by one (StreamingLLM): beyond
      that many tokens the first ones stay at a constant distance.
  """

  first: int = 4
  budget: Budget = budgets.Tokens(516)
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
    total = self.budget.count(prompt, layer.index, layer.depth)
    if total <= self.first:
      raise ValueError(
        f"budget={self.budget}: shows {total} of {prompt} tokens, no more than"
        f" the first={self.first} ones; raise it or protect fewer"
      )

  def total(self, layer, arrivals):
    """Tokens that queries see in all, `[b]`."""
    of = budgets.counts(self.budget, layer.index, layer.depth, arrivals.valid)
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
    if self.reindexed or self.dense or not budgets.fixed(self.budget):
      return None
    total = self.budget.count(tokens, layer.index, layer.depth)
    near = layouts.Window(total - self.first - 1)
    return layouts.Causal() & (layouts.Sinks(self.first) | near)

  def products(self, layer, arrivals, memory):
    near = super().products(layer, arrivals, memory)
    if not (self.reindexed and self.first):
      return near
    # Distances to the first tokens grow up to the size of the cache only.
    last = self.total(layer, arrivals) - 1
    place = jnp.minimum(arrivals.position, last[:, None])
    q = core.split(layer.rotate(arrivals.q, place), layer.kv_heads)
    m = min(self.first, memory.k.shape[1])
    k = layer.rotate(memory.k[:, :m], memory.position[:, :m])
    k = core.heads_first(k)

    def rows(at):
      far = core.logits(layer, q[:, :, :, at], k)
      return jnp.concatenate([far, near(at)[..., m:]], axis=-1)

    return rows


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
  window: Budget = budgets.Tokens(256)
  dense_layers: tuple[int, ...] = ()

  @property
  def needs(self) -> tuple[str, ...]:
    return ("token",)

  @property
  def whole(self) -> bool:
    return not budgets.fixed(self.window)

  def with_keep(self, keep: float) -> "Separators":
    return dataclasses.replace(self, window=self.window.with_keep(keep))

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    if layer.index in self.dense_layers:
      return causal
    ids = jnp.asarray(self.tokens, memory.token.dtype)
    always = (memory.position < self.first) | jnp.isin(memory.token, ids)
    window = budgets.counts(
      self.window, layer.index, layer.depth, arrivals.valid
    )

    def rows(at):
      near = _distances(arrivals, memory, at) < window[:, None, None]
      return causal(at) & (always[:, None, :] | near)[:, None]

    return rows


def _distances(arrivals, memory, at):
  """How far keys lie before the queries numbered `at`, `[b, c, n]`."""
  return arrivals.position[:, at][:, :, None] - memory.position[:, None, :]
