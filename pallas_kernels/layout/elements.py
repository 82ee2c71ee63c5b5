"""Element masks of chosen blocks or rows, where lists are not enough."""

import functools

import jax
from jax import numpy as jnp

from pallas_kernels.layout import types


def block_masks(layout, index):
  """Visibility of the pairs in chosen blocks.

  Args:
    layout: BlockLayout.
    index: int32 `[*lead, L, q blocks, n]`, key blocks per query block.

  Returns:
    bool `[*lead, L, q blocks, n, block_q, block_k]`, all rules applied; a
    block that is not listed is all False.
  """
  kinds = jnp.take_along_axis(layout.kinds(), index, axis=-1)[..., None, None]
  shown = kinds == 1
  if layout.mask_fn is not None:
    shown = shown & _fn_blocks(layout, index)
  if layout.partial_mask is not None:
    shown = shown & stored_masks(layout, index)
  if layout.q_segments is not None:
    shown = shown & _segment_blocks(layout, index)
  if layout.k_len % layout.block_k:
    k = _k_positions(layout, index) < layout.k_len
    shown = shown & k[..., None, :]
  return (kinds == 2) | shown


def stored_masks(layout, index):
  """`partial_mask` of chosen blocks; True where the block is full."""
  kinds = jnp.take_along_axis(layout.kinds(), index, axis=-1)
  slots = slots_of(layout, index)
  stored = layout.over_rows(lambda m, s: m[s], layout.partial_mask, slots)
  return stored | (kinds == 2)[..., None, None]


def slots_of(layout, index):
  """Places of chosen blocks in the partial lists (0 where not listed)."""
  slots = jnp.take_along_axis(layout.slots(), index, axis=-1)
  return jnp.minimum(slots, layout.partial_index.shape[-1] - 1)


def _k_positions(layout, index):
  inside = jnp.arange(layout.block_k, dtype=jnp.int32)
  inside = jnp.expand_dims(inside, tuple(range(index.ndim)))
  return index[..., None] * layout.block_k + inside


def _fn_blocks(layout, index):
  """`mask_fn` over chosen blocks."""
  bq, lead = layout.block_q, len(layout.lead)
  rows = jnp.arange(layout.q_blocks * bq, dtype=jnp.int32).reshape(-1, bq)
  k = _k_positions(layout, index)
  tag = None
  if layout.partial_tag is not None:
    tag = jnp.take_along_axis(
      layout.partial_tag, slots_of(layout, index), axis=-1
    )

  def block(h, q, k, tag):
    q, k = q[:, None], k[None, :]
    shape = (q.shape[0], k.shape[1])
    return jnp.broadcast_to(
      types.apply_mask_fn(layout.mask_fn, h, q, k, tag), shape
    )

  fn = jax.vmap(block, in_axes=(None, None, 0, 0))  # Over list entries.
  fn = jax.vmap(fn, in_axes=(None, 0, 0, 0))  # Over query blocks.
  fn = jax.vmap(fn, in_axes=(0, None, 0, 0))  # Over heads.
  for _ in range(lead):
    fn = jax.vmap(fn, in_axes=(None, None, 0, 0))
  return fn(jnp.arange(layout.heads, dtype=jnp.int32), rows, k, tag)


def _segment_blocks(layout, index):
  """Equality of segment ids over chosen blocks."""
  q, k = layout.q_segments, layout.k_segments
  pad = lambda x, block: jnp.pad(
    x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
  ).reshape(x.shape[:-1] + (-1, block))
  q, k = pad(q, layout.block_q), pad(k, layout.block_k)
  pick = lambda q, k, index: q[:, None, :, None] == k[index][:, :, None, :]
  pick = jax.vmap(pick, in_axes=(None, None, 0))
  for _ in layout.lead:
    pick = jax.vmap(pick)
  return pick(q, k, index)


def row_masks(layout, rows):
  """Visibility of every key for chosen query rows.

  Args:
    layout: BlockLayout.
    rows: int32 `[r]`, query positions.

  Returns:
    bool `[*lead, L, r, k_len]`.
  """
  block = rows // layout.block_q
  pick = lambda x: (
    None if x is None else jnp.take(x, block, axis=len(layout.lead) + 1)
  )
  stored = pick(layout.partial_mask)
  if stored is not None:  # [*lead, L, r, capacity, block_q, block_k]
    inside = lambda m, r: jnp.take(m, r % layout.block_q, axis=-2)
    stored = jax.vmap(inside, in_axes=(-4, 0), out_axes=-3)(stored, rows)
  one = functools.partial(_row_mask, layout)
  one = jax.vmap(one, in_axes=(None, 0, 0, 0, 0, 0))
  one = jax.vmap(one, in_axes=(0, None, 0, 0, 0, 0))
  for _ in layout.lead:
    one = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))
  full, shown = one(
    jnp.arange(layout.heads, dtype=jnp.int32),
    rows,
    pick(layout.kinds()),
    pick(layout.slots()),
    pick(layout.partial_tag),
    stored,
  )
  if layout.q_segments is not None:
    q_ids = jnp.take(layout.q_segments, rows, axis=-1)[..., :, None]
    k_ids = layout.k_segments[..., None, : layout.k_len]
    shown = shown & (q_ids == k_ids)[..., None, :, :]
  return full | shown


def _row_mask(layout, h, row, kinds, slots, tags, stored):
  """Full and partial visibility of one row, segments apart: `[k_len]` each.

  kinds and slots are `[k blocks]`; tags, `[capacity]`, and stored, `[capacity,
  block_k]`, may be None.
  """
  slots = jnp.minimum(slots, layout.partial_index.shape[-1] - 1)
  spread = lambda x: jnp.repeat(x, layout.block_k)[: layout.k_len]
  kinds = spread(kinds)
  shown = kinds == 1
  if layout.mask_fn is not None:
    k = jnp.arange(layout.k_len, dtype=jnp.int32)
    tag = None if tags is None else spread(tags[slots])
    shown = shown & types.apply_mask_fn(
      layout.mask_fn, h, jnp.broadcast_to(row, k.shape), k, tag
    )
  if stored is not None:
    shown = shown & stored[slots].reshape(-1)[: layout.k_len]
  return kinds == 2, shown
