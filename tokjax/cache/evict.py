"""Eviction: score, select under protection and budget, plan, apply.

The same plan rule serves at the end of the prompt (`Evict`) and between steps
(`Trim`). A budget below what is protected is refused when a model is built.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import selection
from tokjax.cache import budgets
from tokjax.cache import entries as entries_lib
from tokjax.budgets import Budget
from tokjax.cache.contract import Arrivals, Layer
from tokjax.cache.entries import Entries
from tokjax.cache.workspace import Workspace
from tokjax.plan import Assignment


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One example's prompt, as scorers see it.

  Attributes:
    layer: static facts.
    q: last queries before rotation, as many as the method asked for, newest
      at the end where it asked for a window, `[w, H, D]`.
    q_position, q_valid: of those, `[w]`.
    k, v: before rotation, `[n, G, D]`.
    position, valid: of keys, `[n]`.
    token: ids, `[n]`, where asked for.
    lse: log-sum-exps of the logits of the prompt's queries, `[H, n]`, where
      attention left them.
  """

  layer: Layer
  q: Float[Array, "w h d"]
  q_position: Int[Array, "w"]
  q_valid: Bool[Array, "w"]
  k: Float[Array, "n g d"]
  v: Float[Array, "n g d"]
  position: Int[Array, "n"]
  valid: Bool[Array, "n"]
  token: Int[Array, "n"] | None
  lse: Float[Array, "h n"] | None = None

  @property
  def rotated_q(self) -> Float[Array, "w h d"]:
    return self.layer.rotate(self.q, self.q_position)

  @property
  def rotated_k(self) -> Float[Array, "n g d"]:
    return self.layer.rotate(self.k, self.position)

  @property
  def length(self) -> Int[Array, ""]:
    return self.valid.sum(dtype=jnp.int32)


Scorer = Callable[[Prompt], Array]


def over_prompts(
  layer: Layer, space: Workspace, fn: Callable[..., Any], *more: Array
) -> Any:
  """`fn` of every example's prompt, and of its part of `more`."""

  def one(q, q_position, q_valid, m, lse, *more):
    prompt = Prompt(
      layer, q, q_position, q_valid, m.k, m.v, m.position, m.valid, m.token, lse
    )
    return fn(prompt, *more)

  of = (space.q, space.q_position, space.q_valid, space.memory, space.lse)
  return jax.vmap(one)(*of, *more)


def chosen(
  score: Float[Array, "n"],
  length: Int[Array, ""],
  *,
  room: int,
  count: Int[Array, ""] | int,
  first: Int[Array, ""] | int = 0,
  last: Int[Array, ""] | int = 0,
) -> selection.Selection:
  """The best entries with the first and the last ones, in the text's order.

  Args:
    score: higher stays; -inf never does.
    length: how many of the n places count.
    room: static bound of `count`.
    count: how many stay, the protected included (never fewer than those).
    first, last: so many at either end are protected.
  """
  place = jnp.arange(score.shape[0])
  ends = (place < first) | (place >= length - last)
  count = jnp.maximum(count, jnp.minimum(first + last, length))
  score = jnp.where(ends, jnp.inf, score)
  mask = (place < length) & (score > -jnp.inf)
  return selection.in_order(
    selection.top_k(score, room, mask=mask, count=count)
  )


def plan_of(
  pick: selection.Selection, length: Int[Array, ""], n: int, merge: bool
) -> Assignment:
  """Keeps what was picked; what was not is dropped, or merged into one entry.

  The merged entry is the mean of its members and stands where the first of
  them stood (`n` entries in all, one output more than were picked).
  """
  if not merge:
    return Assignment.select(pick.index, n, pick.valid)
  place = jnp.arange(n)
  stays = jnp.zeros((n,), bool).at[pick.index].max(pick.valid)
  gone = (place < length) & ~stays
  anchor = jnp.argmax(gone)
  parent = jnp.where(stays, place, jnp.where(gone, anchor, n))
  return Assignment.from_parent(
    parent, min(pick.index.shape[0] + 1, n), mask=place < length, full=False,
    exact=False,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evict:
  """Compresses a prompt once, when it is complete.

  Attributes:
    score: of one example's `Prompt`, `[G, n]`, higher stays.
    budget: how many entries a head keeps, the protected ones included.
    first, last: how many at either end are protected, or budgets of those.
    queries: how many last queries `score` reads; None: all.
    merge: what goes becomes one entry more, the mean of its members, which
      counts for all of them.
    remember: under this name entries keep their score.
    needs: parts of the arrivals that `score` reads besides ("token").
  """

  score: Scorer
  budget: Budget
  first: int = 0
  last: int | Budget = 0
  queries: int | None = 0
  merge: bool = False
  remember: str = ""
  needs: tuple[str, ...] = ()

  def check(self, layer: Layer, prompt: int) -> None:
    """Raises where a prompt of full length may not even keep the protected."""
    at = (prompt, layer.index, layer.depth)
    kept = self.budget.count(*at)
    least = self.first + budgets.of(self.last).count(*at)
    if kept < min(least, prompt):
      raise ValueError(
        f"{self.budget} keeps {kept} of {prompt} tokens in layer"
        f" {layer.index}, fewer than the {least} that are protected; raise the"
        " budget or protect fewer"
      )

  def with_keep(self, keep: float) -> "Evict":
    """Keeps that fraction; a protected end that is part of the budget too."""
    budget = self.budget.with_keep(keep)
    last = self.last
    old, new = self.budget, budget
    if isinstance(old, budgets.Sum) and isinstance(new, budgets.Sum):
      last = new.b if last == old.b else last
    return dataclasses.replace(self, budget=budget, last=last)

  def limits(
    self, layer: Layer, prompt: int, length: Int[Array, "b"]
  ) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
    """What each example may keep, and how many last ones are protected."""
    count, last = (
      jnp.asarray(budgets.table(b, prompt, layer.index, layer.depth))[length]
      for b in (self.budget, budgets.of(self.last))
    )
    return jnp.maximum(count, self.first + last), last

  def room(self, layer: Layer, prompt: int) -> int:
    """Places for the kept entries of any prompt up to that length."""
    return min(self.most(layer, prompt), prompt)

  def most(self, layer: Layer, prompt: int) -> int:
    """The largest number any of those prompts is entitled to."""
    of = lambda b: budgets.table(b, prompt, layer.index, layer.depth)
    least = self.first + of(budgets.of(self.last))
    return int(max(of(self.budget).max(), least.max()))

  def __call__(self, layer: Layer, space: Workspace, whole: Entries) -> Entries:
    """The entries `[b, G, room]` that stay of `whole`, `[b, G, n]`."""
    score = over_prompts(layer, space, self.score)
    extra = dict(whole.extra)
    if self.remember:
      extra[self.remember] = score
    if self.merge:
      extra["count"] = jnp.ones(score.shape, jnp.float32)
    n = whole.room
    room = self.room(layer, n)
    count, last = self.limits(layer, n, space.length)

    def one(e, score, count, last):
      pick = chosen(
        score, e.length, room=room, count=count, first=self.first, last=last
      )
      plan = plan_of(pick, e.length, n, self.merge)
      if self.merge:
        plan = plan.weighted(e.extra["count"])
      return entries_lib.move(plan, e)

    wide = lambda x: jnp.broadcast_to(x[:, None], score.shape[:2])
    return entries_lib.over_heads(
      one, whole.replace(extra=extra), score, wide(count), wide(last)
    )


@dataclasses.dataclass(frozen=True)
class Trim:
  """Evicts between steps, when more than `limit` entries are there.

  Counts and protection are those that the prompt was entitled to.

  Attributes:
    score: "recent" (the newest stay) or the name of a remembered score.
    after: whether attention still sees what goes in this step.
    slack: how many entries beyond the budget are let in before it acts.
    merge: as in `Evict`.
    always: acts in every step, whatever is there: what has the score -inf goes
      as soon as it is not protected.
    arriving: the score of a new token, from the step's arrivals to `[b]`; by
      default 0.
  """

  score: str = "recent"
  after: bool = False
  slack: int = 0
  merge: bool = False
  always: bool = False
  arriving: Callable[[Arrivals], Array] | None = None

  def __call__(
    self,
    entries: Entries,
    first: int,
    count: Int[Array, "b"],
    last: Int[Array, "b"],
  ) -> Entries:
    """The same room, fewer entries where there were too many."""
    wide = lambda x: jnp.broadcast_to(x[:, None], entries.length.shape)
    single = not (self.merge or self.slack or self.always)
    one = self._less_one if single else self._cut
    return entries_lib.over_heads(
      lambda e, count, last: one(e, first, count, last),
      entries, wide(count), wide(last),
    )  # fmt: skip

  def _score(self, e: Entries) -> Float[Array, "n"]:
    if self.score == "recent":
      return e.position.astype(jnp.float32)
    return e.extra[self.score]

  def _less_one(self, e, first, count, last) -> Entries:
    """The lowest one goes, of equals the latest: steps bring one at a time."""
    place = jnp.arange(e.room)
    free = (place >= first) & (place < e.length - last)
    score = jnp.where(free, self._score(e), jnp.inf)
    full = e.length > count
    goes = jnp.where(full, e.room - 1 - jnp.argmin(score[::-1]), e.room)

    def closed(x):
      stays = (place < goes).reshape(-1, *(1,) * (x.ndim - 1))
      return jnp.where(stays, x, jnp.roll(x, -1, axis=0))

    return e.map(closed, e.length - full)

  def _cut(self, e, first, count, last) -> Entries:
    """All go that are too many."""
    pick = chosen(
      self._score(e), e.length, room=e.room, count=count, first=first, last=last
    )
    plan = plan_of(pick, e.length, e.room, self.merge)
    if self.merge:
      plan = plan.weighted(e.extra["count"])
    fewer = entries_lib.move(plan, e)
    full = (e.length > count + self.merge + self.slack) | self.always
    return jax.tree.map(lambda a, b: jnp.where(full, a, b), fewer, e)
