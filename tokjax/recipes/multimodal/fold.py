"""Turbo and FOLDER: tokens merge that are alike and that the class ignores."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import matching, scores
from tokjax.binding import bind
from tokjax.budgets import AtEnd, Budget, Constant, Count
from tokjax.plan import Assignment, Plan
from tokjax.recipes.multimodal.encoder import CLASS_MEAN
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Keys, Rows
from tokjax.slots import Slots

CODE = "anakin-skywalker-Joseph/Folder"
EVIDENCE = (
  f"{CODE}:llava/model/folder/merge.py, patch/folder.py (d4750b9), run next to"
  " this on the same arrays"
)
SMALL = "merges however few tokens there are (the official code from 40 on)"


def fold(site: Site, *, metric: Keys, row: Rows, weight: float) -> Plan:
  """Merges by pairs, again and again until few enough remain.

  Every second token may join the most similar of those in between; those go
  first that are similar to one and that the class token attends to least. Half
  of the tokens go at most before the others are paired anew.
  """
  n = left = site.num_free
  keys = site[metric].astype(jnp.float32).mean(axis=0)
  attention = site[row].astype(jnp.float32)
  size, mask = site.size, site.mask
  plan: Any = Assignment.identity(n)  # What assignments compose to is one.
  due = site.keep if site.due is None else site.due
  while left > site.keep:
    after = max(left - left // 2, site.keep)
    sides = matching.parity(left, first="target", mask=mask)
    edges = scores.cosine(keys[sides.source], keys[sides.target])
    edges = edges - 100 * weight * attention[sides.source][:, None]
    count = None
    if mask is not None:
      real = mask.sum(dtype=jnp.int32)
      count = jnp.maximum(real - real // 2, due)
    step = matching.bipartite(
      edges, sides, left, left - after, mask=mask, count=count
    )
    keys = step.weighted(size).apply(keys)
    attention = _mean(step, attention)
    size = step.total(size)
    mask = step.valid
    plan, left = plan.then(step), after
  return plan.weighted(site.size)


def _mean(
  plan: Assignment, values: Float[Array, "n"]
) -> Float[Array, "m"]:
  """The mean over members, whatever their sizes."""
  return plan.weighted(jnp.ones_like(values)).apply(values)


def _slots(budget: Budget, weight: float, **options) -> Slots:
  if not weight >= 0:
    raise ValueError(f"weight={weight}: must be 0 or more")
  rule = bind(fold, metric=Keys(), row=CLASS_MEAN, weight=weight)
  return Slots(Reduce(rule, budget, at="mlp"), **options).within("vision")


@recipe(
  "turbo",
  family="vlm",
  paper="Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language"
  " Large Models",
  arxiv="2407.11717",
  code=CODE,
  evidence=EVIDENCE,
  deviations=SMALL,
)
def turbo(budget: Budget = Constant(16), weight: float = 5.0) -> Slots:
  """ToMe in every block, sparing what the class token attends to.

  Args:
    budget: how many patches remain after each block.
    weight: of class attention, times 100, against the cosine of keys.
  """
  return _slots(budget, weight, proportional=True)


@recipe(
  "folder",
  family="vlm",
  paper="FOLDER: Accelerating Multi-modal Large Language Models with Enhanced"
  " Performance",
  arxiv="2501.02430",
  code=CODE,
  evidence=EVIDENCE,
  deviations=SMALL,
)
def folder(budget: Budget = Count(192), weight: float = 5.0) -> Slots:
  """Turbo's merging at once, in the block whose output are the features.

  Args:
    budget: how many patches remain.
    weight: see `turbo`.
  """
  return _slots(AtEnd(budget), weight)
