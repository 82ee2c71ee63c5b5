"""Brings a layout to given leading dimensions, heads and padding."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
from jax import numpy as jnp

if TYPE_CHECKING:  # `types` imports this module.
  from pallas_kernels.layout.types import BlockLayout


def with_lead(layout: "BlockLayout", batch: tuple[int, ...]) -> "BlockLayout":
  """Flattens the leading axes to exactly one, of size 1 or `prod(batch)`.

  Segments are padded to whole blocks, with ids that match nothing.

  Raises:
    ValueError: if the leading axes do not broadcast to `batch`.
  """
  lead = layout.lead
  size = math.prod(batch)
  if len(lead) > len(batch) or any(
    n not in (1, m) for n, m in zip(lead[::-1], batch[::-1], strict=False)
  ):
    raise ValueError(
      f"layout has leading axes {lead}, which do not broadcast to the batch "
      f"axes {batch} of q"
    )

  def flat(x):
    rest = x.shape[len(lead) :]
    if math.prod(lead) == 1:
      return x.reshape((1,) + rest)
    x = x.reshape((1,) * (len(batch) - len(lead)) + x.shape)
    return jnp.broadcast_to(x, batch + rest).reshape((size,) + rest)

  layout = jax.tree.map(flat, layout)
  if layout.q_segments is None:
    return layout
  pad = lambda x, n, fill: jnp.pad(
    x, ((0, 0), (0, n - x.shape[1])), constant_values=fill
  )
  low = jnp.iinfo(jnp.int32).min
  return dataclasses.replace(
    layout,
    q_segments=pad(layout.q_segments, layout.q_blocks * layout.block_q, low),
    k_segments=pad(
      layout.k_segments, layout.k_blocks * layout.block_k, low + 1
    ),
  )


def expand_heads(layout: "BlockLayout", heads: int) -> "BlockLayout":
  """Repeats the layout heads, so that there is one per query head.

  Raises:
    ValueError: if the layout's heads do not divide `heads`.
  """
  if heads % layout.heads:
    raise ValueError(f"{layout.heads} layout heads do not divide {heads} heads")
  times = heads // layout.heads
  if times == 1:
    return layout
  axis = len(layout.lead)
  spread = lambda x: None if x is None else jnp.repeat(x, times, axis=axis)
  per_head = (
    "full_count",
    "full_index",
    "partial_count",
    "partial_index",
    "dropped",
    "partial_tag",
    "partial_mask",
  )
  return dataclasses.replace(
    layout,
    transpose=jax.tree.map(spread, layout.transpose),
    **{name: spread(getattr(layout, name)) for name in per_head},
  )


def broadcast(layout: "BlockLayout", lead: tuple[int, ...]) -> "BlockLayout":
  """Broadcasts the leading axes to `lead`."""
  rank = len(layout.lead)

  def wide(x):
    rest = x.shape[rank:]
    x = x.reshape((1,) * (len(lead) - rank) + x.shape)
    return jnp.broadcast_to(x, tuple(lead) + rest)

  return layout if layout.lead == tuple(lead) else jax.tree.map(wide, layout)
