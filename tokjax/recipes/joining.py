"""Several recipes as one `Slots`: what goes together, and what does not."""

import dataclasses
from typing import Any

from tokjax.slots import Slots


def compose(*parts: Slots) -> Slots:
  """One `Slots` that carries out all parts, checked when a model is built.

  Reductions act one after the other, with counts that run from what the
  earlier ones left. A slot that only one part fills is taken over; two caches
  are joined where they fill different parts of one (what is evicted, how it is
  stored, what is read). Towers that several parts fill are composed in the same
  way.

  Args:
    *parts: what recipes returned, in the order in which they act.

  Raises:
    ValueError: two parts fill one slot; names both recipes and the slot.
  """
  if not parts:
    raise ValueError("compose: give at least one recipe")
  whole = parts[0]
  for part in parts[1:]:
    whole = _both(whole, part)
  return whole


def _both(a: Slots, b: Slots) -> Slots:
  name = f"{a.name}+{b.name}"
  names = {loss.name for loss in a.losses} & {loss.name for loss in b.losses}
  if names:
    raise ValueError(
      f"recipes {a.name!r} and {b.name!r} both add a loss {sorted(names)[0]!r};"
      " use one of the two"
    )
  if a.adapter_rank and b.adapter_rank and a.adapter_rank != b.adapter_rank:
    raise ValueError(
      f"recipes {a.name!r} and {b.name!r} ask for adapters of rank"
      f" {a.adapter_rank} and {b.adapter_rank}; give them one rank"
    )
  return Slots(
    reduce=a.reduce + b.reduce,
    attend=_one(a, b, "attend"),
    cache=_cache(a, b),
    program=_one(a, b, "program"),
    proportional=a.proportional or b.proportional,
    pool_by_size=a.pool_by_size or b.pool_by_size,
    losses=a.losses + b.losses,
    collect=tuple(dict.fromkeys(a.collect + b.collect)),
    adapter_rank=max(a.adapter_rank, b.adapter_rank),
    draft=_one(a, b, "draft"),
    pass_class=a.pass_class or b.pass_class,
    towers=_towers(a, b),
    name=name,
  )


def _towers(a: Slots, b: Slots) -> tuple[tuple[str, Slots], ...]:
  """The towers of both; one that both fill is composed in itself."""
  joined = dict(a.towers)
  for name, slots in b.towers:
    joined[name] = _both(joined[name], slots) if name in joined else slots
  return tuple(joined.items())


def _one(a: Slots, b: Slots, slot: str) -> Any:
  """What fills a slot, if only one of the two does."""
  first, second = getattr(a, slot), getattr(b, slot)
  if first is None or second is None or first == second:
    return second if first is None else first
  raise ValueError(
    f"recipes {a.name!r} and {b.name!r} both fill the slot {slot!r}; use one of"
    " the two"
  )


def _cache(a: Slots, b: Slots) -> Any:
  first, second = a.cache, b.cache
  if first is None or second is None or first == second:
    return second if first is None else first
  joined = _joined(first, second)
  if joined is None:
    return _one(a, b, "cache")
  return joined


def _joined(first: Any, second: Any) -> Any:
  """Two caches made of parts, where no part is filled by both."""
  if type(first) is not type(second) or not hasattr(first, "parts"):
    return None
  empty, changes = type(first)(), {}
  for name in first.parts:
    one, other = getattr(first, name), getattr(second, name)
    default = getattr(empty, name)
    if default not in (one, other) and one != other:
      return None
    changes[name] = other if one == default else one
  return dataclasses.replace(first, **changes)
