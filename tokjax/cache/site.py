"""What a rule of `reduce` sees of one head of a cache, and what it does there.

The tokens of a site are the entries of a key head. Its rules are those of
blocks of a model, at the end of a prompt and between steps alike.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tokjax.cache import entries as entries_lib
from tokjax.cache.entries import Entries
from tokjax.layer import Layer
from tokjax.reduce import lift
from tokjax.reduce.reduction import Carried
from tokjax.reduce.site import Site
from tokjax.signals import Answers
from tokjax.tokens import Kind, Tokens


class CacheSite(Site):
  """The entries of one head of a cache, as a rule sees them.

  The index of the layer is read from `of` when a rule asks for it, which few
  do: layers share a compiled program unless it is read (`Layer.ask`).
  """

  def __init__(
    self,
    of: Layer,
    tokens: Tokens,
    answers: Answers,
    keep: int,
    free_at: Bool[Array, "n"] | None,
    due: Int[Array, ""] | None = None,
  ):
    super().__init__(
      tokens, answers, keep, depth=of.depth, due=due, free_at=free_at
    )
    object.__setattr__(self, "of", of)

  @property
  def layer(self) -> int:
    return self.of.index

  @layer.setter
  def layer(self, _: int) -> None:
    """The initialiser of `Site` sets its fields; this one is not kept."""

  @property
  def answering(self) -> int:
    return self.of.key


@dataclasses.dataclass(frozen=True)
class EachHead:
  """A rule over the entries of every head.

  Attributes:
    rule, rest: see `tokjax.reduce.reduction.Reduce`.
    keep: room for entries that are not protected.
    spare: room for protected ones.
    room: room in all.
    layer: where.
  """

  rule: Callable[[Site], Any]
  rest: str
  keep: int
  spare: int
  room: int
  layer: Layer

  def __call__(
    self,
    entries: Entries,
    answers: Answers,
    first: Int[Array, "b g"],
    count: Int[Array, "b"],
    last: Int[Array, "b"],
  ) -> Entries:
    """What stays of `entries`.

    Args:
      entries: `[b, G, n]`.
      answers: about them, leading axes `[b, G]`.
      first, last: how many at either end are protected.
      count: how many an example may keep, the protected included.
    """
    wide = lambda x: jnp.broadcast_to(x[:, None], entries.length.shape)
    return entries_lib.over_heads(
      self._one, entries, answers, first, wide(count), wide(last)
    )

  def _one(self, e, answers, first, count, last) -> Entries:
    place = jnp.arange(e.room)
    there = place < e.length
    if self.layer.window is not None:
      there = there & (place >= e.length - self.layer.window)
    free = there & (place >= first) & (place < e.length - last)
    tokens = tokens_of(e, there)
    due = jnp.minimum(count, there.sum()) - (there & ~free).sum()
    due = jnp.maximum(due, 0).astype(jnp.int32)
    site = CacheSite(self.layer, tokens, answers, self.keep, free, due)
    found = self.rule(site)
    plan = found.plan if isinstance(found, Carried) else found
    if self.rest == "mean":
      plan = lift.with_mean_of_rest(plan, free, tokens.size)
    plan = lift.anywhere(plan, there & ~free, self.spare, self.room)
    return entries_lib.move(plan, e)


def tokens_of(e: Entries, there: Bool[Array, "n"]) -> Tokens:
  """One head's entries as tokens, which rules see; features are the keys."""
  one = jnp.ones((e.room,), jnp.float32)
  return Tokens(
    e.k, e.extra.get("count", one), e.position[:, None].astype(jnp.float32),
    jnp.full((e.room,), Kind.TEXT, jnp.int32), there,
  )  # fmt: skip
