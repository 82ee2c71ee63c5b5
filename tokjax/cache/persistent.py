"""TidalDecode: tokens that one layer chooses and later layers read, too."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tokjax import budgets, selection
from tokjax.budgets import Budget
from tokjax.cache.reads import ReadAll, attend_to

# In the carry: what was chosen, for each window that layers have.
CHOSEN = "persistent"


class Selecting(ReadAll):
  """A read for which some layers choose, and those above follow them.

  Attributes:
    budget: tokens that are handed on.
    layers: the selecting layers, as numbers or fractions of the depth.
  """

  budget: Budget
  layers: tuple[int | float, ...]

  dense = False

  def with_keep(self, keep: float) -> Any:
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def selecting(self, depth: int) -> tuple[int, ...]:
    """The layers that choose, the first one first."""
    of = lambda layer: budgets.block(layer, depth, "layers")
    return tuple(sorted({of(layer) for layer in self.layers}))

  def role(self, index: int, depth: int) -> str:
    """What a layer does: "read all", "select" or "follow"."""
    selecting = self.selecting(depth)
    if index in selecting:
      return "select"
    return "follow" if index > selecting[0] else "read all"

  def check(self, layer):
    self.selecting(layer.depth)


@dataclasses.dataclass(frozen=True)
class Persistent(Selecting):
  """Tokens that an earlier layer chose, for the same query head (TidalDecode).

  The selecting layers and those below the first of them read everything; a
  selecting layer hands on the entries with the largest logits, none forced.
  Layers of different windows hold different entries, so that they share no
  choice: the first of each kind behind a selecting layer selects for its kind.

  Attributes:
    budget: tokens that are handed on.
    layers: the selecting layers, as numbers or fractions of the depth.
  """

  budget: Budget
  layers: tuple[int | float, ...] = (2, 0.4)

  def build(self, layer, entries, prompt, length):
    table = layer.ask(budgets.table, self.budget, prompt)
    return jnp.asarray(table)[length]

  def __call__(self, query, entries, index, carry):
    layer, role = query.layer, query.layer.ask(self.role)
    kind, chosen = str(layer.window), carry.get(CHOSEN)
    due = role == "select"
    selects = due or (chosen is not None and kind not in chosen)
    if role == "follow" and not selects:
      if chosen is None:
        raise ValueError(
          f"Persistent: no earlier layer chose for these heads of layer"
          f" {layer.index}; read the same heads with it in layer"
          f" {self.selecting(layer.depth)[0]}"
        )
      at, valid = chosen[kind]
      return attend_to(query, entries, at, valid), None, carry
    logits = query.logits(entries)
    seen = query.seen(entries)[:, :, None, None]
    out, weight = query.attention(entries, logits, seen)
    if selects:
      tokens = layer.ask(budgets.table, self.budget, entries.room)
      most = min(int(tokens.max()), entries.room)
      pick = lambda x, seen, count: selection.top_k(
        x, most, mask=seen, count=count
      )
      over = jax.vmap(jax.vmap(jax.vmap(pick, (0, None, None)), (0, 0, None)))
      new = over(logits[:, :, :, 0], query.seen(entries), index)
      others = {} if due else chosen
      carry = {**carry, CHOSEN: {**others, kind: tuple(new)}}
    return out, weight, carry
