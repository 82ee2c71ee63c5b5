"""Layouts to and from element masks: O(S^2) by nature, for tests and inputs."""

import jax
import numpy as np
from jax import numpy as jnp


def to_dense(layout):
  """Element mask bool `[*lead, L, q_len, k_len]` of a layout.

  A `mask_fn` is called with the *layout* head; with fewer layout heads than
  query heads and a mask that tells heads apart, expand the layout first.
  """
  kinds = _spread(layout, layout.kinds())
  shown = kinds == 1
  if layout.mask_fn is not None:
    shown = shown & _fn_mask(layout)
  if layout.partial_mask is not None:
    shown = shown & _array_mask(layout)
  if layout.q_segments is not None:
    q = layout.q_segments[..., : layout.q_len, None]
    same = q == layout.k_segments[..., None, : layout.k_len]
    shown = shown & same[..., None, :, :]
  return (kinds == 2) | shown


def _spread(layout, blocks):
  """Repeats a block map `[..., q blocks, k blocks]` to its elements."""
  wide = jnp.repeat(blocks, layout.block_q, axis=-2)
  wide = jnp.repeat(wide, layout.block_k, axis=-1)
  return wide[..., : layout.q_len, : layout.k_len]


def _fn_mask(layout):
  """`mask_fn` over all elements, bool `[*lead or 1s, L, q_len, k_len]`."""
  q = jnp.arange(layout.q_len, dtype=jnp.int32)[:, None]
  k = jnp.arange(layout.k_len, dtype=jnp.int32)[None, :]
  heads = jnp.arange(layout.heads, dtype=jnp.int32)
  shape = layout.lead + (layout.heads, layout.q_len, layout.k_len)
  if layout.partial_tag is None:
    one = lambda h: jnp.broadcast_to(layout.mask_fn(h, q, k), shape[-2:])
    fixed = jax.vmap(one)(heads)
    return jnp.broadcast_to(
      jnp.expand_dims(fixed, tuple(range(len(layout.lead)))), shape
    )
  tags = jnp.take_along_axis(layout.partial_tag, _clipped_slots(layout), -1)
  one = lambda h, tag: layout.mask_fn(h, q, k, tag)
  fn = jax.vmap(one)
  for _ in layout.lead:
    fn = jax.vmap(fn, in_axes=(None, 0))
  return fn(heads, _spread(layout, tags))


def _clipped_slots(layout):
  return jnp.minimum(layout.slots(), layout.partial_index.shape[-1] - 1)


def _array_mask(layout):
  """`partial_mask` laid out over all elements."""

  def row(slots, blocks):
    picked = blocks[slots]  # [k blocks, block_q, block_k]
    return jnp.swapaxes(picked, 0, 1).reshape(layout.block_q, -1)

  rows = layout.over_rows(row, _clipped_slots(layout), layout.partial_mask)
  whole = rows.reshape(rows.shape[:-3] + (-1, rows.shape[-1]))
  return whole[..., : layout.q_len, : layout.k_len]


def block_view(mask, block_q, block_k):
  """Cuts masks `[..., Q, K]` to `[..., q blocks, k blocks, bq, bk]`, padded."""
  pad = [(0, 0)] * (mask.ndim - 2) + [
    (0, -mask.shape[-2] % block_q),
    (0, -mask.shape[-1] % block_k),
  ]
  mask = jnp.pad(mask, pad)
  rows, columns = mask.shape[-2] // block_q, mask.shape[-1] // block_k
  mask = mask.reshape(mask.shape[:-2] + (rows, block_q, columns, block_k))
  return jnp.swapaxes(mask, -3, -2)


def mask_kinds(mask, block_q, block_k):
  """Classifies the blocks of element masks `[..., Q, K]`.

  Padded queries do not keep a block from being full; padded keys do.

  Returns:
    int8 `[..., q blocks, k blocks]`: 0 nothing visible, 1 partly, 2 all.
  """
  blocks = block_view(mask, block_q, block_k)
  rows = jnp.arange(blocks.shape[-4] * block_q).reshape(-1, 1, block_q, 1)
  padding = jnp.broadcast_to(rows >= mask.shape[-2], blocks.shape[-4:])
  padding = jnp.expand_dims(padding, tuple(range(blocks.ndim - 4)))
  some = jnp.any(blocks, axis=(-2, -1))
  every = jnp.all(blocks | padding, axis=(-2, -1))
  kind = jnp.where(every, np.int8(2), np.int8(1))
  return jnp.where(some, kind, np.int8(0))
