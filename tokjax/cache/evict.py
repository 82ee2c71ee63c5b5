"""Eviction at the end of a prompt: a reduction of a key head's entries.

The rules are those of `reduce`, see `tokjax.cache.site`; what each prompt may
keep, see `tokjax.cache.limits`. A budget below what is protected is refused
when a model is built. In a sliding layer scores are those of the whole prompt.
What goes later, between steps: `tokjax.cache.trim`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from tokjax import budgets
from tokjax.budgets import Budget
from tokjax.cache import answers as answers_lib
from tokjax.cache.answers import REMEMBERED
from tokjax.cache.entries import Entries
from tokjax.cache.limits import Limits
from tokjax.cache.site import EachHead
from tokjax.cache.workspace import Workspace
from tokjax.layer import Layer
from tokjax.reduce.free import Free
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Question
from tokjax.tokens import Kind

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


def merges(reduce: Reduce) -> bool:
  """Whether an entry may stand for several tokens, which it then counts."""
  return reduce.rest == "mean" or not getattr(reduce.rule, "selects", False)


def evict(
  reduce: Reduce,
  layer: Layer,
  space: Workspace,
  whole: Entries,
  remember: Question | None = None,
) -> Entries:
  """The entries `[b, G, room]` that stay of `whole`, `[b, G, n]`.

  Args:
    reduce: the reduction.
    layer, space: the prompts.
    whole: their entries.
    remember: a question whose answer entries carry on, or None.
  """
  of = Limits.of(reduce, layer, whole.room)
  asked = dict.fromkeys((*reduce.asks, *([remember] if remember else ())))
  answers = answers_lib.of_prompt(layer, space, asked)
  extra = dict(whole.extra)
  if remember is not None:
    extra[REMEMBERED] = answers[remember.answered(layer.key)]
  if merges(reduce):
    extra["count"] = jnp.ones(whole.position.shape, jnp.float32)
  whole = whole.replace(extra=extra)
  count, last = of.at(space.length)
  step = EachHead(reduce.rule, reduce.rest, of.free, int(of.ends.max()),
                  of.room, layer)  # fmt: skip
  own = tuple(q.answered(layer.key) for q in reduce.asks)
  first = jnp.full(whole.length.shape, of.first)
  return step(whole, answers.only(frozenset(own)), first, count, last)
