"""All reductions of a model as stages: counts, refusals, questions.

Counts run from one reduction to the next, in the order in which a block
carries them out. What cannot be is refused here, when the model is built.
"""

import dataclasses
import math

from tokjax import signals
from tokjax.budgets import BudgetError, Counts, exact, table
from tokjax.reduce.reduction import AT, INSIDE, Reduce
from tokjax.reduce.stage import Stage
from tokjax.signals import Question
from tokjax.tokens import Kind

ORDER = tuple(AT)
Stages = tuple[tuple[Stage, ...], ...]


@dataclasses.dataclass(frozen=True)
class Sequence:
  """What a model's sequence can hold: capacities of the longest example.

  Attributes:
    free: tokens of each kind that a rule may touch, at most, as pairs.
    total: tokens in all, at most.
    leading: protected tokens at its head, if all that is protected stands
      there; None: protected tokens may stand anywhere.
    grid: sides of the grid that the free tokens form; None: none.
  """

  free: tuple[tuple[Kind, int], ...]
  total: int
  leading: int | None = None
  grid: tuple[int, ...] | None = None

  def capacity(self, kinds: tuple[Kind, ...]) -> int:
    """Tokens of these kinds, at most."""
    return min(sum(n for kind, n in self.free if kind in kinds), self.total)


def check(
  counts: Counts, tokens: int, *, recipe: str, at_most: float = 1.0
) -> Counts:
  """Raises if a budget runs out of tokens or asks for too much at once.

  Args:
    counts: what the budget says.
    tokens: free tokens at the input.
    recipe: named in the error.
    at_most: the largest fraction one step of this method can remove.
  """
  left = tokens
  for layer, after in enumerate(counts):
    if after is None:
      continue
    check_step(layer, left, after, recipe=recipe, at_most=at_most)
    if after > left:
      raise BudgetError(
        f"{recipe}: block {layer} is to leave {after} tokens but only {left}"
        " arrive there. Leave fewer, or remove fewer before it."
      )
    left = after
  return counts


def check_step(
  layer: int, left: int, after: int, *, recipe: str, at_most: float
) -> None:
  """Raises where a block cannot go from `left` tokens to `after`."""
  least = left - math.floor(left * exact(at_most))
  if after < 1:
    raise BudgetError(
      f"{recipe}: the schedule runs out of tokens at block {layer}: {left}"
      f" are left and {left - after} would be removed; at least 1 must"
      " remain. Remove fewer per block or keep a larger fraction."
    )
  if after < least:
    raise BudgetError(
      f"{recipe}: block {layer} would remove {left - after} of {left} tokens;"
      f" one step of this method removes at most {left - least}. Spread the"
      " reduction over more blocks or keep more."
    )


class _Capacities:
  """Free tokens that are left, by groups of kinds that are reduced together.

  Attributes:
    left: of each group.
    total: tokens in all.
  """

  def __init__(self, sequence: Sequence, recipe: str):
    self.sequence, self.recipe = sequence, recipe
    self.left: dict[frozenset[Kind], int] = {}
    self.total = sequence.total

  def arriving(self, reduce: Reduce) -> int:
    """At most so many free tokens arrive at a reduction."""
    kinds = frozenset(reduce.free.kinds)
    for group in self.left:
      if group != kinds and group & kinds:
        raise ValueError(
          f"recipe {self.recipe!r}: tokens of the kinds {_names(group)} were"
          " reduced together, so that it is unknown how many of each are left;"
          f" reduce all of them again, not only {_names(kinds)}"
        )
    start = self.sequence.capacity(reduce.free.kinds)
    return self.left.get(kinds, start)

  def others(self, reduce: Reduce) -> int:
    """Tokens that a reduction may not touch because of their kind."""
    kinds = frozenset(reduce.free.kinds)
    grouped = kinds.union(*self.left)
    count = self.sequence.leading or 0
    count += sum(n for group, n in self.left.items() if group != kinds)
    count += sum(n for kind, n in self.sequence.free if kind not in grouped)
    return min(count, self.total)


def _names(kinds) -> str:
  return ", ".join(sorted(kind.name for kind in kinds))


def plan_stages(
  reduces: tuple[Reduce, ...],
  sequence: Sequence,
  depth: int,
  *,
  recipe: str,
  filled: bool = True,
  idle: bool = False,
) -> Stages:
  """The stages of every block, with static counts, checked.

  Args:
    reduces: in the order in which they act at one place.
    sequence: what the longest example can hold.
    depth: number of blocks.
    recipe: named in errors.
    filled: False: there is no memory yet, so that reductions that fill from one
      leave every token (and make the memory).
    idle: a reduction that the others leave nothing to do is no error, as where
      a prompt is shorter than those that a model was built for.

  Raises:
    ValueError: a reduction that cannot be carried out; names recipe, block and
      fix.
  """
  left = _Capacities(sequence, recipe)
  grid, gone = sequence.grid, "the input"
  away: list[tuple[int, dict, int, tuple[int, ...] | None]] = []
  made: list[tuple[Stage, ...]] = []
  for layer in range(depth):
    for _, before, total, whole in [a for a in away if a[0] == layer][::-1]:
      left.left, left.total, grid = dict(before), total, whole
    block: list[Stage] = []
    ordered = [
      (i, r) for at in ORDER for i, r in enumerate(reduces) if r.at == at
    ]
    for number, reduce in ordered:
      before = (dict(left.left), left.total, grid)
      stage = _stage_at(
        reduce, number, layer, depth, left, grid, recipe, len(reduces) > 1,
        filled,
      )  # fmt: skip
      if stage is None:
        continue
      if reduce.gridded and grid is None:
        raise ValueError(
          f"recipe {recipe!r} works on a complete grid of tokens, which is"
          f" gone after {gone}, but is scheduled for block {layer}; use a"
          " budget that acts once, such as Once or Square, before what"
          " reduces the grid"
        )
      block.append(stage)
      if reduce.around:
        continue
      back = reduce.back
      if back is not None and isinstance(back.until, int):
        if layer + back.until > depth:
          raise ValueError(
            f"recipe {recipe!r}: back={back} at block {layer} goes beyond the"
            f" last of {depth} blocks; use until='end' or fewer blocks"
          )
        away.append((layer + back.until, *before))
      if stage.keep < stage.arriving:
        grid, gone = None, f"block {layer} ({reduce.recipe or recipe})"
      left.left[frozenset(reduce.free.kinds)] = stage.leaves
      left.total = stage.outputs
    _check_block(block, layer, recipe)
    made.append(tuple(block))
  if not idle:
    _check_idle(reduces, made, sequence, depth, recipe)
  asked(tuple(made), depth, recipe)
  return tuple(made)


def _stage_at(
  reduce, number, layer, depth, left, grid, recipe, several, filled
) -> Stage | None:
  """The stage of a reduction at a block, None where it does nothing."""
  start, budget = left.sequence.capacity(reduce.free.kinds), reduce.budget
  if not start or budget.count(start, layer, depth) is None:
    return None  # No tokens of these kinds at all, or none to remove here.
  arriving = left.arriving(reduce)
  after = budget.count(
    arriving if budget.of == "arriving" else start, layer, depth
  )
  if after is None:
    return None
  if budget.bound:
    most = table(budget, start, layer, depth)
    after = int(most[: arriving + 1].max())
  elif after > arriving and not several:
    check((None,) * layer + (after,), arriving, recipe=recipe)
  memory = reduce.back is not None and reduce.back.fill == "memory"
  if memory and not filled:
    after = arriving
  if after >= arriving:
    idle = after > arriving or budget.bound or reduce.around
    if idle and not memory:
      return None
    after = arriving
  check_step(layer, arriving, after, recipe=recipe, at_most=reduce.at_most)
  common = dict(
    layer=layer, depth=depth, initial=start, number=number, arriving=arriving,
    grid=grid if reduce.gridded else None, leaves=after,
  )  # fmt: skip
  if left.sequence.leading is not None and reduce.free.whole:
    return Stage(reduce, after, protected=left.sequence.leading, **common)
  ends = reduce.free.ends(arriving, layer, depth)
  keep = max(after - ends, 1) if reduce.free.inside else after
  spare = min(left.others(reduce) + ends, left.total)
  extra = reduce.rest == "mean"
  room = min(spare + keep + extra, left.total)
  return Stage(
    reduce, keep, protected=0, leading=False, spare=spare, room=room, **common
  )


def _check_block(block: list[Stage], layer: int, recipe: str) -> None:
  """Two reductions inside one attention cannot both be carried out."""
  inside = [s for s in block if s.reduce.at in INSIDE]
  if len(inside) > 1:
    names = " and ".join(s.reduce.recipe or recipe for s in inside)
    raise ValueError(
      f"recipe {recipe!r}: two reductions ({names}) act inside the attention of"
      f" block {layer}; one of them can. Give them different blocks"
    )


def _check_idle(reduces, made, sequence, depth, recipe) -> None:
  """A reduction that acts alone but never after the others is refused."""
  acting = {stage.number for block in made for stage in block}
  for number, reduce in enumerate(reduces):
    start = sequence.capacity(reduce.free.kinds)
    alone = reduce.budget.counts(start, depth)
    reduces_alone = any(n is not None and n < start for n in alone)
    if reduces_alone and number not in acting:
      raise BudgetError(
        f"recipe {recipe!r}: {reduce.recipe or reduce.rule} never acts: fewer"
        f" tokens arrive than {reduce.budget} leaves of {start}. Keep fewer"
        " there, or more in the reductions before it"
      )


def asked(
  stages: Stages, depth: int, recipe: str = ""
) -> tuple[tuple[Question, ...], ...]:
  """What every block has to answer, with absolute layers.

  Raises:
    ValueError: a block that does not exist, or that comes later.
  """
  found: list[dict[Question, None]] = [{} for _ in range(depth)]
  around = {
    s.layer: s for block in stages for s in block if s.reduce.around
  }
  for block in stages:
    for stage in block:
      for question in stage.reduce.asks:
        if isinstance(question, signals.OF_THE_CALL):
          continue
        at = question.at(stage.layer, depth)
        if not 0 <= at < depth:
          raise ValueError(
            f"recipe {recipe!r} asks {type(question).__name__} of block {at}"
            f" before block {stage.layer}, where no attention has been computed"
            " yet; schedule it for later blocks"
          )
        if at > stage.layer:
          raise ValueError(
            f"recipe {recipe!r} asks {type(question).__name__} of block {at} at"
            f" block {stage.layer}; ask that block or an earlier one"
          )
        other = around.get(at)
        of_tokens = isinstance(question, signals.OF_TOKENS)
        ahead = at == stage.layer and stage.reduce.at == "input"
        if other is not None and other != stage and not (of_tokens or ahead):
          raise ValueError(
            f"recipe {recipe!r}: {stage.reduce.recipe or 'a reduction'} asks"
            f" {type(question).__name__} of block {at}, whose attention runs on"
            f" fewer tokens ({other.reduce.recipe or 'another'} acts around"
            " it); give them different blocks"
          )
        found[at][question.answered(at)] = None
  return tuple(tuple(block) for block in found)


def wanted_after(
  stages: Stages, layer: int, at: str, depth: int
) -> frozenset[Question]:
  """Questions that are asked after a place: answers to the others can go."""
  place = (layer, ORDER.index(at))
  return frozenset(
    question.answered(question.at(stage.layer, depth))
    for block in stages
    for stage in block
    if (stage.layer, ORDER.index(stage.reduce.at)) >= place
    for question in stage.reduce.asks
    if not isinstance(question, signals.OF_THE_CALL)
  )
