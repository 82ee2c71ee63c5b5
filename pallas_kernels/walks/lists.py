"""The lists of a layout as rows of numbers, one for each resident block.

Kernels read a row from scalar or global memory: counts first, then full and
partial block numbers, then what belongs to the partial blocks.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp

# The two counts come first.
_COUNTS = 2


def rows(plan, layout):
  """Counts, lists, tags and slots of each resident block in one row.

  Args:
    plan: says `keys_resident` (read the transposed lists), `capacity`,
      `streamed_blocks`, `has_tag` and `has_mask`.
    layout: BlockLayout with one leading axis.

  Returns:
    int32 `[1 or B, L, resident blocks, n]`. The kernels do not check bounds,
    so that numbers outside the arrays are brought inside here.
  """
  lists = layout.transpose if plan.keys_resident else layout
  within = lambda x, top: jnp.clip(x, 0, top)
  parts = [
    within(lists.full_count, plan.capacity[0])[..., None],
    within(lists.partial_count, plan.capacity[1])[..., None],
    within(lists.full_index, plan.streamed_blocks - 1),
    within(lists.partial_index, plan.streamed_blocks - 1),
  ]
  if plan.has_tag:
    parts.append(_tags(layout) if plan.keys_resident else layout.partial_tag)
  if plan.has_mask and plan.keys_resident:
    parts.append(within(lists.partial_slot, layout.partial_index.shape[-1] - 1))
  return jnp.concatenate(parts, axis=-1)


class Starts(NamedTuple):
  """Where full and partial block numbers, tags and slots start in a row."""

  full: int
  partial: int
  tag: int
  slot: int


def starts(plan):
  """The `Starts` of a plan's rows."""
  full, partial = plan.capacity
  tag = _COUNTS + full + partial
  return Starts(_COUNTS, _COUNTS + full, tag, tag + partial * plan.has_tag)


def _tags(layout):
  """Tags in the order of the transposed partial lists."""
  index, slot = layout.transpose.partial_index, layout.transpose.partial_slot
  pick = lambda tag, i, t: tag[i, t]
  return jax.vmap(jax.vmap(pick))(layout.partial_tag, index, slot)
