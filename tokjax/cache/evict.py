"""Eviction: the rules of `reduce`, with a key head's entries as tokens.

The same plan rule serves at the end of the prompt (`evict`) and between steps
(`Trim`). A budget below what is protected is refused when a model is built.

In a sliding layer the candidates are the entries that the prompt's last token
sees, and budgets are counted from these: a fraction is one of the window.
Scores are those of the whole prompt. First tokens are protected as long as they
are in sight. A budget that is below what is protected there, but not in a layer
without a window, is raised to it, as it is for short prompts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets, signals
from tokjax.budgets import Budget
from tokjax.cache import answers as answers_lib
from tokjax.cache import entries as entries_lib
from tokjax.cache.answers import REMEMBERED
from tokjax.cache.entries import Entries
from tokjax.cache.workspace import Workspace
from tokjax.layer import Arrivals, Layer
from tokjax.reduce import lift
from tokjax.reduce.free import Free
from tokjax.reduce.reduction import Carried, Reduce
from tokjax.reduce.rules import KEEP_NEWEST
from tokjax.reduce.site import Site
from tokjax.signals import Answers
from tokjax.tokens import Kind, Tokens

TEXT = (Kind.TEXT,)


def evicting(
  rule: Callable[[Site], Any],
  budget: Budget,
  *,
  first: int = 0,
  last: int | Budget = 0,
  merge: bool = False,
) -> Reduce:
  """A reduction of cache entries; the protected ends count in the budget.

  Args:
    rule: `Site -> Plan`, see `tokjax.reduce.rules`.
    budget: how many entries a head keeps.
    first, last: how many at either end are protected.
    merge: what goes becomes one entry more, the mean of its members, which
      counts for all of them.
  """
  free = Free(TEXT, first, last, inside=True)
  return Reduce(rule, budget, free=free, rest="mean" if merge else "drop")


@dataclasses.dataclass(frozen=True)
class Limits:
  """What prompts up to a length are entitled to at a layer, of all lengths.

  Attributes:
    count: entries that stay, the protected included, `[tokens + 1]`, where
      `tokens` are those of the longest prompt that are in sight.
    last: how many last ones are protected, `[tokens + 1]`.
    first: how many first ones are.
    slides: the layer has a window, so that the first ones may be out of sight.
  """

  count: np.ndarray
  last: np.ndarray
  first: int
  slides: bool

  @classmethod
  def of(cls, reduce: Reduce, layer: Layer, prompt: int) -> "Limits":
    prompt = layer.in_sight(prompt)
    free = reduce.free
    last = layer.ask(budgets.table, budgets.of(free.last), prompt)
    count = layer.ask(budgets.table, reduce.budget, prompt)
    length = np.arange(prompt + 1)
    count = np.where(count == budgets.NOTHING, length, count)
    if free.inside:
      count = np.maximum(count, free.first + last)
    else:
      count = count + free.first + last
    return cls(count, last, free.first, layer.window is not None)

  def at(
    self, length: Int[Array, "b"]
  ) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
    """What prompts may keep, and how many last ones are protected."""
    length = jnp.minimum(length, len(self.count) - 1)
    return jnp.asarray(self.count)[length], jnp.asarray(self.last)[length]

  @property
  def ends(self) -> np.ndarray:
    """Protected entries of prompts of each length."""
    return np.minimum(self.first + self.last, np.arange(len(self.last)))

  @property
  def most(self) -> int:
    """The largest number any of those prompts is entitled to."""
    return int(self.count.max())

  @property
  def free(self) -> int:
    """Room for entries that are not protected."""
    length = np.arange(len(self.count))
    ends = np.minimum(self.last, length) if self.slides else self.ends
    return int((np.minimum(self.count, length) - ends).max())


def check(reduce: Reduce, layer: Layer, prompt: int) -> None:
  """Raises where a cache cannot evict so, with the reason and the fix."""
  answers_lib.queries_of(reduce.asks)
  wrong = [
    name
    for name, value in (
      ("back", reduce.back), ("again", reduce.again), ("soft", reduce.soft),
      ("learned", reduce.learned), ("combine", reduce.combine),
      ("unmerged", reduce.unmerged),
    )
    if value
  ]  # fmt: skip
  if wrong or reduce.at != "input" or reduce.position != "keep":
    raise ValueError(
      f"evict={reduce}: {', '.join(wrong) or 'at and position'} are not for"
      " caches; leave them out"
    )
  at = (prompt, layer.index, layer.depth)
  kept = reduce.budget.count(*at)
  least = reduce.free.first + budgets.of(reduce.free.last).count(*at)
  if reduce.free.inside and kept is not None and kept < min(least, prompt):
    raise ValueError(
      f"{reduce.budget} keeps {kept} of {prompt} tokens in layer"
      f" {layer.index}, fewer than the {least} that are protected; raise the"
      " budget or protect fewer"
    )


def room(reduce: Reduce, layer: Layer, prompt: int) -> int:
  """Places for the kept entries of any prompt up to that length."""
  merged = reduce.rest == "mean"
  most = Limits.of(reduce, layer, prompt).most
  return min(most + merged, layer.in_sight(prompt))


def limits(
  reduce: Reduce, layer: Layer, prompt: int, length: Int[Array, "b"]
) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
  """What each example may keep, and how many last ones are protected."""
  return Limits.of(reduce, layer, prompt).at(length)


def evict(
  reduce: Reduce,
  layer: Layer,
  space: Workspace,
  whole: Entries,
  remember: Any = None,
) -> Entries:
  """The entries `[b, G, room]` that stay of `whole`, `[b, G, n]`.

  Args:
    reduce: the reduction.
    layer, space: the prompts.
    whole: their entries.
    remember: a question whose answer entries carry on, or None.
  """
  n = whole.room
  of = Limits.of(reduce, layer, n)
  asked = dict.fromkeys((*reduce.asks, *([remember] if remember else ())))
  answers = answers_lib.of_prompt(layer, space, asked)
  extra = dict(whole.extra)
  if remember is not None:
    extra[REMEMBERED] = answers[remember.answered(layer.key)]
  if reduce.rest == "mean" or not _selects(reduce.rule):
    extra["count"] = jnp.ones(whole.position.shape, jnp.float32)
  whole = whole.replace(extra=extra)
  count, last = of.at(space.length)
  step = _Heads(reduce.rule, reduce.rest, of.free, int(of.ends.max()),
                room(reduce, layer, n), layer)  # fmt: skip
  own = tuple(q.answered(layer.key) for q in reduce.asks)
  first = jnp.full(whole.length.shape, of.first)
  return step(whole, answers.only(frozenset(own)), first, count, last)


def _selects(rule: Any) -> bool:
  """Whether a rule only keeps and drops, so that nothing has to be counted."""
  return getattr(rule, "selects", False)


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
class _Heads:
  """A rule over the entries of every head.

  Attributes:
    rule, rest: see `Reduce`.
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
    tokens = _tokens(e, there)
    due = jnp.minimum(count, there.sum()) - (there & ~free).sum()
    due = jnp.maximum(due, 0).astype(jnp.int32)
    site = CacheSite(self.layer, tokens, answers, self.keep, free, due)
    found = self.rule(site)
    plan = found.plan if isinstance(found, Carried) else found
    if self.rest == "mean":
      plan = lift.with_mean_of_rest(plan, free, tokens.size)
    plan = lift.anywhere(plan, there & ~free, self.spare, self.room)
    return entries_lib.move(plan, e)


@dataclasses.dataclass(frozen=True)
class Trim:
  """Evicts between steps, when more than `limit` entries are there.

  Counts and protection are those that the prompt was entitled to.

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

  rule: Any = KEEP_NEWEST
  remember: Any = None
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
  def asks(self) -> tuple[Any, ...]:
    return signals.questions_of(self.rule)

  def remembered(self, layer: Layer) -> Any:
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
    """The same room, fewer entries where there were too many."""
    there = _first_there(layer, entries, first)
    answers = answers_lib.of_step(entries, self.asks, layer, weight)
    score = getattr(self.rule, "score", None)
    single = not (self.merge or self.slack or self.always)
    if single and score is not None:
      wide = lambda x: jnp.broadcast_to(x[:, None], entries.length.shape)
      one = lambda e, answers, first, count, last: _less_one(
        e, _scored(score, e, answers, layer), first, count, last
      )
      return entries_lib.over_heads(
        one, entries, answers, there, wide(count), wide(last)
      )
    n = entries.room
    if self.merge and "count" not in entries.extra:
      extra = {**entries.extra, "count": jnp.ones(entries.position.shape)}
      entries = entries.replace(extra=extra)
    rest = "mean" if self.merge else "drop"
    fewer = _Heads(self.rule, rest, n - self.merge, n, n, layer)(
      entries, answers, there, count, last
    )
    full = entries.length > (count + self.merge + self.slack)[:, None]
    full = full | self.always

    def pick(new, old):
      where = full.reshape(*full.shape, *(1,) * (new.ndim - 2))
      return jnp.where(where, new, old)

    return jax.tree.map(pick, fewer, entries)


@dataclasses.dataclass(frozen=True)
class Tally(Trim):
  """Evicts nothing; entries remember what heads attended to.

  The sum over the heads of a group, of the prompt's last token and of every
  step since. `attended` reads it.

  Attributes:
    since: the first layer that does, as a fraction of the depth: a number for
      each entry is stored in the others in vain.
  """

  remember: Any = signals.Rows(of=signals.Last(), over="sum")
  after: bool = True
  since: float = 0.0

  evicts = False

  def remembered(self, layer: Layer) -> Any:
    acts = layer.ask(lambda index, depth: index >= int(self.since * depth))
    return self.remember if acts else None


def attended(
  entries: Entries, tokens: int, heads: int
) -> Float[Array, "b n"]:
  """What a `Tally` adds up, by positions in the prompt; mean over heads.

  Args:
    entries: of one layer, which keep their positions.
    tokens: of the prompt, at most.
    heads: query heads of the layer.
  """

  def one(e: Entries) -> Array:
    at = jnp.where(e.valid, e.position, tokens)
    return jnp.zeros((tokens,)).at[at].add(e.extra[REMEMBERED], mode="drop")

  return jax.vmap(jax.vmap(one))(entries).sum(axis=1) / heads


def _first_there(
  layer: Layer, entries: Entries, first: int
) -> Int[Array, "b g"]:
  """How many of the text's first tokens are still there, in front."""
  if layer.window is None:
    return jnp.full(entries.length.shape, first)
  early = entries.valid & (entries.position < first)
  return early.sum(axis=-1, dtype=jnp.int32)


def _tokens(e: Entries, there: Bool[Array, "n"]) -> Tokens:
  """One head's entries as tokens, which rules see; features are the keys."""
  one = jnp.ones((e.room,), jnp.float32)
  return Tokens(
    e.k, e.extra.get("count", one), e.position[:, None].astype(jnp.float32),
    jnp.full((e.room,), Kind.TEXT, jnp.int32), there,
  )  # fmt: skip


def _scored(score, e: Entries, answers: Answers, layer: Layer) -> Array:
  """A rule's scores of one head's entries."""
  tokens = _tokens(e, jnp.arange(e.room) < e.length)
  return score(CacheSite(layer, tokens, answers, e.room, tokens.mask))


def _less_one(
  e: Entries,
  score: Float[Array, "n"],
  first: Int[Array, ""],
  count: Int[Array, ""],
  last: Int[Array, ""],
) -> Entries:
  """The lowest one goes, of equals the latest: steps bring one at a time."""
  place = jnp.arange(e.room)
  free = (place >= first) & (place < e.length - last)
  score = jnp.where(free, score, jnp.inf)
  full = e.length > count
  goes = jnp.where(full, e.room - 1 - jnp.argmin(score[::-1]), e.room)

  def closed(x):
    stays = (place < goes).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(stays, x, jnp.roll(x, -1, axis=0))

  return e.map(closed, e.length - full)
