"""Eviction between steps, by the rules that also serve at the prompt's end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import signals
from tokjax.cache import answers as answers_lib
from tokjax.cache import entries as entries_lib
from tokjax.cache.entries import Entries
from tokjax.cache.site import CacheSite, EachHead, tokens_of
from tokjax.layer import Arrivals, Layer
from tokjax.reduce.rules import KEEP_NEWEST
from tokjax.reduce.site import Site
from tokjax.signals import Answers, Question


@dataclasses.dataclass(frozen=True)
class Trim:
  """Evicts between steps, once more entries are there than may stay.

  How many may, and which are protected, is what the prompt was entitled to.

  Attributes:
    rule: `Site -> Plan`, asked of the entries at a step; by default the newest
      stay. What it may ask: see `tokjax.cache.answers.of_step`.
    remember: a question about the prompt whose answer entries carry with them
      (`Remembered`); None: none.
    after: whether attention still sees what goes in this step; what heads
      attend to is then added to the remembered score.
    slack: how many entries beyond the budget are let in before it acts: it
      then acts every slack + 1 steps.
    merge: what goes becomes one entry, the mean of its members.
    always: acts in every step, however many are there: what has the score
      minus infinity goes as soon as it is not protected.
    arriving: the remembered score of a new token, from the step's arrivals to
      `[b]`; by default 0.
  """

  rule: Callable[[Site], Any] = KEEP_NEWEST
  remember: Question | None = None
  after: bool = False
  slack: int = 0
  merge: bool = False
  always: bool = False
  arriving: Callable[[Arrivals], Array] | None = None

  # Whether anything ever goes.
  evicts = True

  def __post_init__(self):
    if self.slack < 0:
      raise ValueError(f"slack={self.slack}: must not be negative")

  @property
  def asks(self) -> tuple[Question, ...]:
    return signals.questions_of(self.rule)

  def remembered(self, layer: Layer) -> Question | None:
    """The question whose answer entries of a layer carry with them, or None."""
    del layer
    return self.remember

  def check(self) -> None:
    """Raises ValueError for questions that a step does not answer."""
    for question in self.asks:
      match question:
        case answers_lib.Remembered() if self.remember is not None:
          continue
        case signals.Keys(rotated=None) | signals.Values():
          continue
        case signals.Rows() if self.after and question.of == signals.Last():
          continue
      raise ValueError(answers_lib.step_refuses(question))

  def __call__(
    self,
    layer: Layer,
    entries: Entries,
    first: int,
    count: Int[Array, "b"],
    last: Int[Array, "b"],
    weight: Array | None = None,
  ) -> Entries:
    """The same room, fewer entries where there were too many.

    Args:
      layer: where.
      entries: `[b, G, n]`.
      first, last: how many at either end are protected.
      count: how many an example may keep, the protected included.
      weight: what the step's query attends to, `[b, G, r, 1, n]`; None: nothing
        is known yet.
    """
    there = _first_there(layer, entries, first)
    answers = answers_lib.of_step(entries, self.asks, layer, weight)
    score = getattr(self.rule, "score", None)
    if score is not None and not (self.merge or self.slack or self.always):
      return _without_lowest(layer, score, entries, answers, there, count, last)
    n = entries.room
    if self.merge and "count" not in entries.extra:
      extra = {**entries.extra, "count": jnp.ones(entries.position.shape)}
      entries = entries.replace(extra=extra)
    rest = "mean" if self.merge else "drop"
    fewer = EachHead(self.rule, rest, n - self.merge, n, n, layer)(
      entries, answers, there, count, last
    )
    full = entries.length > (count + self.merge + self.slack)[:, None]
    full = full | self.always

    def pick(new, old):
      where = full.reshape(*full.shape, *(1,) * (new.ndim - 2))
      return jnp.where(where, new, old)

    return jax.tree.map(pick, fewer, entries)


def _first_there(
  layer: Layer, entries: Entries, first: int
) -> Int[Array, "b g"]:
  """How many of the text's first tokens are still there, in front."""
  if layer.window is None:
    return jnp.full(entries.length.shape, first)
  early = entries.valid & (entries.position < first)
  return early.sum(axis=-1, dtype=jnp.int32)


def _without_lowest(
  layer: Layer,
  score: Callable[[Site], Array],
  entries: Entries,
  answers: Answers,
  first: Int[Array, "b g"],
  count: Int[Array, "b"],
  last: Int[Array, "b"],
) -> Entries:
  """One less in every head that is full: steps bring one entry at a time."""

  def one(e, answers, first, count, last):
    tokens = tokens_of(e, jnp.arange(e.room) < e.length)
    site = CacheSite(layer, tokens, answers, e.room, tokens.mask)
    return _less_one(e, score(site), first, count, last)

  wide = lambda x: jnp.broadcast_to(x[:, None], entries.length.shape)
  return entries_lib.over_heads(
    one, entries, answers, first, wide(count), wide(last)
  )


def _less_one(
  e: Entries,
  score: Float[Array, "n"],
  first: Int[Array, ""],
  count: Int[Array, ""],
  last: Int[Array, ""],
) -> Entries:
  """The lowest one goes, of equals the latest."""
  place = jnp.arange(e.room)
  free = (place >= first) & (place < e.length - last)
  score = jnp.where(free, score, jnp.inf)
  full = e.length > count
  goes = jnp.where(full, e.room - 1 - jnp.argmin(score[::-1]), e.room)

  def closed(x):
    stays = (place < goes).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(stays, x, jnp.roll(x, -1, axis=0))

  return e.map(closed, e.length - full)
