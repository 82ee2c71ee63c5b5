"""Another pattern for each query head, and the offline choice of it."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.attention import core
from tokjax.attention.causal import Causal, changed
from tokjax.layer import Arrivals, Layer, Memory

# What a pattern leaves alone that is a mask.
HOOKS = ("products", "bias", "finish", "weights", "__call__")


@dataclasses.dataclass(frozen=True)
class PerHead(Causal):
  """Query head h of layer l sees what `patterns[choice[l][h]]` shows.

  Only masks are combined: what else a pattern changes (distances, weights) is
  refused.

  Attributes:
    patterns: attentions.
    choice: number of a pattern, for every layer and query head.
  """

  patterns: tuple[Causal, ...]
  choice: tuple[tuple[int, ...], ...]

  def __post_init__(self):
    for pattern in self.patterns:
      found = changed(pattern, HOOKS)
      # A band has products of its own for re-indexed distances only.
      if found == ["products"] and not getattr(pattern, "reindexed", True):
        found = []
      if found:
        raise ValueError(
          f"{pattern} changes {found}, not only what heads see; give PerHead"
          " patterns that are masks"
        )
    hash(self)

  @property
  def needs(self) -> tuple[str, ...]:
    return tuple(sorted({n for p in self.patterns for n in p.needs}))

  @property
  def whole(self) -> bool:
    return any(pattern.whole for pattern in self.patterns)

  def check(self, layer, prompt):
    if len(self.choice) != layer.depth or any(
      len(row) != layer.heads
      or not all(0 <= i < len(self.patterns) for i in row)
      for row in self.choice
    ):
      raise ValueError(
        f"choice={self.choice}: must name one of {len(self.patterns)} patterns"
        f" for each of {layer.heads} query heads in {layer.depth} layers"
      )
    for pattern in self.patterns:
      pattern.check(layer, prompt)

  def seen(self, layer, arrivals, memory):
    row = layer.ask(lambda index, depth: self.choice[index])
    used = sorted(set(row))
    shown = [self.patterns[i].seen(layer, arrivals, memory) for i in used]

    def rows(at):
      masks = [mask(at) for mask in shown]
      pick = lambda mask, head: mask[:, head % mask.shape[1]]
      heads = [pick(masks[used.index(i)], h) for h, i in enumerate(row)]
      return jnp.stack(heads, axis=1)

    return rows


def kept_mass(
  pattern: Causal, layer: Layer, arrivals: Arrivals, memory: Memory, last: int
) -> Float[Array, "h"]:
  """Share of dense attention that a pattern shows, for the last queries.

  MInference's first search score, over the batch and its last real queries
  (fb56c91, minference_forward.py: rows from 2500 on).

  Args:
    pattern: see `PerHead`.
    layer, arrivals, memory: a sample text at one layer.
    last: how many last queries count.
  """
  dense = Causal().weights(layer, arrivals, memory)
  shown = pattern.seen(layer, arrivals, memory)
  length = arrivals.valid.sum(axis=1)[:, None]

  def rows(at) -> Float[Array, "b c h"]:
    p = dense(at)
    p = p.reshape(p.shape[0], layer.heads, *p.shape[3:])
    counts = (at[None] >= length - last) & arrivals.valid[:, at]
    mass = jnp.where(shown(at) & counts[:, None, :, None], p, 0.0).sum(-1)
    return jnp.swapaxes(mass, 1, 2)

  t = arrivals.q.shape[1]
  total = core.over_rows(rows, t).sum(axis=(0, 1))
  real: Bool[Array, "b t"] = jnp.arange(t)[None] >= length - last
  return total / jnp.maximum((real & arrivals.valid).sum(), 1)


def best_patterns(
  patterns: tuple[Causal, ...],
  layer: Layer,
  arrivals: Arrivals,
  memory: Memory,
  last: int,
) -> tuple[int, ...]:
  """The pattern that keeps most attention, for each query head of a layer."""
  mass = [kept_mass(p, layer, arrivals, memory, last) for p in patterns]
  return tuple(jnp.argmax(jnp.stack(mass), axis=0).tolist())
