"""Set operations on layouts, inside jit, on block maps rather than elements."""

import dataclasses
import functools
import operator

import numpy as np
from jax import numpy as jnp

from pallas_kernels.layout import (
  build,
  elements,
  frame,
  mask_fns,
  patterns,
  types,
)
from pallas_kernels.layout.types import BlockLayout


def intersect(a: BlockLayout, b: BlockLayout) -> BlockLayout:
  """Pairs that both layouts show.

  At most one of them may have segments, or else the masks of the common
  partial blocks are stored elementwise.

  Raises:
    ValueError: if lengths, block sizes, leading axes or heads do not match.
  """
  a, b = _aligned(a, b)
  layout = build.from_kinds(
    jnp.minimum(a.kinds(), b.kinds()),
    full_capacity=min(a.capacity[0], b.capacity[0]),
    partial_capacity=min(sum(a.capacity), sum(b.capacity)),
    **_sizes(a),
  )
  layout = _inherit_dropped(layout, a, b)
  if a.q_segments is not None and b.q_segments is not None:
    return _stored(layout, a, b, operator.and_)
  index = layout.partial_index
  stored = [
    elements.stored_masks(x, index)
    for x in (a, b)
    if x.partial_mask is not None
  ]
  owner = b if a.q_segments is None else a
  layout = dataclasses.replace(
    layout,
    partial_mask=functools.reduce(operator.and_, stored) if stored else None,
    q_segments=owner.q_segments,
    k_segments=owner.k_segments,
  )
  if a.partial_tag is None and b.partial_tag is None:
    # An untagged mask function is true all over its layout's full blocks.
    return dataclasses.replace(
      layout, mask_fn=mask_fns.both(a.mask_fn, b.mask_fn)
    )
  return _tagged(layout, a, b, "and")


def union(a: BlockLayout, b: BlockLayout) -> BlockLayout:
  """Pairs that either layout shows.

  Layouts with one mask function (or none on one side, without partial blocks)
  share it; different ones are told apart by tags; stored masks and segments
  are written out for the partial blocks of the result.

  Raises:
    ValueError: if lengths, block sizes, leading axes or heads do not match.
  """
  a, b = _aligned(a, b)
  layout = build.from_kinds(
    jnp.maximum(a.kinds(), b.kinds()),
    full_capacity=sum(a.capacity[:1] + b.capacity[:1]),
    partial_capacity=sum(a.capacity[1:] + b.capacity[1:]),
    **_sizes(a),
  )
  layout = _inherit_dropped(layout, a, b)
  simple = lambda x: x.partial_mask is None and x.q_segments is None
  if not (simple(a) and simple(b)):
    return _stored(layout, a, b, operator.or_)
  if a.mask_fn == b.mask_fn and a.partial_tag is None and b.partial_tag is None:
    return dataclasses.replace(layout, mask_fn=a.mask_fn)
  return _tagged(layout, a, b, "or")


def _stored(layout, a, b, op):
  """Writes out the element masks of the partial blocks."""
  masks = [elements.block_masks(x, layout.partial_index) for x in (a, b)]
  return dataclasses.replace(layout, partial_mask=op(*masks))


def _tagged(layout, a, b, op):
  """Combines mask functions by tags that say where each one applies."""
  fn = mask_fns.Tagged(a.mask_fn, b.mask_fn, op)
  index = layout.partial_index
  kinds = [jnp.take_along_axis(x.kinds(), index, axis=-1) for x in (a, b)]
  inner = [_tags(x, index) for x in (a, b)]
  return dataclasses.replace(
    layout, mask_fn=fn, partial_tag=fn.tag(*kinds, *inner)
  )


def _tags(layout, index):
  if layout.partial_tag is None:
    return None
  return jnp.take_along_axis(
    layout.partial_tag, elements.slots_of(layout, index), axis=-1
  )


def _inherit_dropped(layout, a, b):
  return dataclasses.replace(layout, dropped=a.dropped + b.dropped)


def _sizes(layout):
  return {
    name: getattr(layout, name)
    for name in ("block_q", "block_k", "q_len", "k_len")
  }


def _aligned(a, b):
  """Gives both layouts the same heads and leading axes."""
  for name, size in _sizes(a).items():
    if size != getattr(b, name):
      raise ValueError(
        f"layouts differ in {name}: {size} and {getattr(b, name)}; combined "
        "layouts must agree in it"
      )
  heads = max(a.heads, b.heads)
  lead = np.broadcast_shapes(a.lead, b.lead)
  return tuple(
    frame.broadcast(frame.expand_heads(x, heads), lead) for x in (a, b)
  )


def shift(layout: BlockLayout, blocks: int) -> BlockLayout:
  """Moves every key block by `blocks`; what leaves the sequence is dropped.

  Query i then sees key j where it saw key `j - blocks * block_k`. A block that
  was cut off by the end of the keys does not come back as a whole.
  """
  kinds = layout.kinds()
  n = layout.k_blocks
  source = np.arange(n) - blocks
  inside = (source >= 0) & (source < n)
  kinds = jnp.where(
    jnp.expand_dims(inside, tuple(range(kinds.ndim - 1))),
    kinds[..., np.clip(source, 0, n - 1)],
    np.int8(0),
  )
  moved = build.from_kinds(
    kinds,
    full_capacity=layout.capacity[0],
    partial_capacity=layout.capacity[1] + 1,
    **_sizes(layout),
  )
  moved = dataclasses.replace(moved, dropped=layout.dropped)
  if any(
    x is not None
    for x in (layout.partial_mask, layout.partial_tag, layout.q_segments)
  ):
    index = jnp.clip(moved.partial_index - blocks, 0, n - 1)
    return dataclasses.replace(
      moved, partial_mask=elements.block_masks(layout, index)
    )
  fn = layout.mask_fn
  if blocks and (fn is not None or layout.k_len % layout.block_k):
    fn = mask_fns.Shifted(fn, blocks * layout.block_k, layout.k_len)
  return dataclasses.replace(moved, mask_fn=fn)


def causal_cut(layout: BlockLayout, offset: int = 0) -> BlockLayout:
  """Hides keys after the query's position plus `offset`."""
  return intersect(
    layout, build.from_pattern(patterns.Causal(offset), **_sizes(layout))
  )


types.define_operators(intersect, union)
