"""Segments (packed documents): only equal ids attend to each other."""

import dataclasses

import numpy as np
from jax import numpy as jnp
from jaxtyping import ArrayLike, Int

from pallas_kernels.layout import algebra, build
from pallas_kernels.layout.types import BlockLayout


def from_segments(
  q_segments: Int[ArrayLike, "*lead q"],
  k_segments: Int[ArrayLike, "*lead k"] | None = None,
  *,
  block_q: int = 128,
  block_k: int = 128,
  full_capacity: int | None = None,
  partial_capacity: int | None = None,
) -> BlockLayout:
  """Builds the layout in which equal segment ids see each other.

  Blocks whose id ranges do not meet are left out, so ids that grow along the
  sequence (packed documents) skip the most. O(q blocks * k blocks) memory.

  Args:
    q_segments: integers `[*lead, q_len]`.
    k_segments: integers `[*lead, k_len]`, by default `q_segments`.
    block_q, block_k: block sizes in tokens.
    full_capacity, partial_capacity: static list lengths, default all blocks.
  """
  q_segments = jnp.asarray(q_segments, jnp.int32)
  k_segments = (
    q_segments if k_segments is None else jnp.asarray(k_segments, jnp.int32)
  )
  q_low, q_high = (x[..., :, None] for x in _id_range(q_segments, block_q))
  k_low, k_high = (x[..., None, :] for x in _id_range(k_segments, block_k))
  meet = (q_low <= k_high) & (k_low <= q_high)
  same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
  kinds = jnp.where(same, np.int8(2), jnp.where(meet, np.int8(1), np.int8(0)))
  layout = build.from_kinds(
    kinds[..., None, :, :],
    block_q=block_q,
    block_k=block_k,
    q_len=q_segments.shape[-1],
    k_len=k_segments.shape[-1],
    full_capacity=full_capacity,
    partial_capacity=partial_capacity,
  )
  return dataclasses.replace(
    layout, q_segments=q_segments, k_segments=k_segments
  )


def _id_range(segments, block):
  """Lowest and highest id of each block, `[*lead, blocks]`."""
  pad = [(0, 0)] * (segments.ndim - 1) + [(0, -segments.shape[-1] % block)]
  blocks = jnp.pad(segments, pad, mode="edge")
  blocks = blocks.reshape(blocks.shape[:-1] + (-1, block))
  return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)


def with_segments(
  layout: BlockLayout,
  q_segments: Int[ArrayLike, "*lead q"],
  k_segments: Int[ArrayLike, "*lead k"] | None,
) -> BlockLayout:
  """Restricts a layout to equal segment ids; see `from_segments`."""
  return algebra.intersect(
    layout,
    from_segments(
      q_segments, k_segments, block_q=layout.block_q, block_k=layout.block_k
    ),
  )
