"""Block lists of other libraries: FlexAttention's and FlashAttention-4's.

Both keep, per (batch, head, query block), counts and indices of full and of
partial ("mask") blocks, with the unused tail of a list free. Their indices are
as long as there are key blocks; ours may be shorter.
"""

import dataclasses
from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Int32

from pallas_kernels.layout import types
from pallas_kernels.layout.types import BlockLayout, MaskFn


def to_flex(layout: BlockLayout) -> dict[str, Int32[Array, "..."]]:
  """Arrays of FlexAttention's `BlockMask`, as a dict by its field names.

  `kv_*` are the partial blocks (evaluated with the mask function), `full_kv_*`
  the full ones, int32 `[*lead, L, q blocks]` and `[..., k blocks]`. The element
  mask is not converted: it is a function there, with other arguments.
  """
  return {
    "kv_num_blocks": layout.partial_count,
    "kv_indices": _widened(layout.partial_index, layout.k_blocks),
    "full_kv_num_blocks": layout.full_count,
    "full_kv_indices": _widened(layout.full_index, layout.k_blocks),
  }


def from_flex(
  kv_num_blocks: Int[ArrayLike, "*lead l i"],
  kv_indices: Int[ArrayLike, "*lead l i c"],
  full_kv_num_blocks: Int[ArrayLike, "*lead l i"] | None = None,
  full_kv_indices: Int[ArrayLike, "*lead l i f"] | None = None,
  *,
  q_len: int,
  k_len: int,
  block_q: int = 128,
  block_k: int = 128,
  mask_fn: MaskFn | None = None,
) -> BlockLayout:
  """Builds a layout from FlexAttention's lists.

  Args:
    kv_num_blocks, kv_indices: counts `[*lead, L, q blocks]` and indices
      `[..., capacity]` of partial blocks.
    full_kv_num_blocks, full_kv_indices: the same for full blocks, or None.
    q_len, k_len, block_q, block_k: sizes in tokens.
    mask_fn: `(h, q, k) -> bool`, for partial blocks. It must hold on the full
      blocks too; a cut-off last key block becomes partial.

  Raises:
    ValueError: if the numbers of query blocks do not fit.
  """
  kv_num_blocks = jnp.asarray(kv_num_blocks, jnp.int32)
  kv_indices = jnp.asarray(kv_indices, jnp.int32)
  if full_kv_num_blocks is None:
    full_kv_num_blocks = jnp.zeros_like(kv_num_blocks)
    full_kv_indices = jnp.zeros_like(kv_indices[..., :1])
  if kv_num_blocks.shape[-1] != -(-q_len // block_q):
    raise ValueError(
      f"kv_num_blocks has shape {kv_num_blocks.shape}; its last axis must be "
      f"the {-(-q_len // block_q)} query blocks"
    )
  layout = types.BlockLayout(
    jnp.asarray(full_kv_num_blocks, jnp.int32),
    jnp.asarray(full_kv_indices, jnp.int32),
    kv_num_blocks,
    kv_indices,
    jnp.zeros(kv_num_blocks.shape[:-1], jnp.int32),
    block_q=block_q,
    block_k=block_k,
    q_len=q_len,
    k_len=k_len,
    mask_fn=mask_fn,
  )
  return layout if k_len % block_k == 0 else _demoted(layout)


def to_fa4(layout: BlockLayout) -> dict[str, dict[str, Int32[Array, "..."]]]:
  """FlashAttention-4's lists, forward and (transposed) backward, as a dict.

  Keys `mask_block_cnt`, `mask_block_idx`, `full_block_cnt`, `full_block_idx`
  of `BlockSparseTensorsTorch`, under "forward" and "backward".
  """
  layout = layout.with_transpose()
  forms: dict[str, tuple[Any, int]] = {
    "forward": (layout, layout.k_blocks),
    "backward": (layout.transpose, layout.q_blocks),
  }
  return {
    name: {
      "mask_block_cnt": lists.partial_count,
      "mask_block_idx": _widened(lists.partial_index, blocks),
      "full_block_cnt": lists.full_count,
      "full_block_idx": _widened(lists.full_index, blocks),
    }
    for name, (lists, blocks) in forms.items()
  }


def from_fa4(
  mask_block_cnt: Int[ArrayLike, "*lead l i"],
  mask_block_idx: Int[ArrayLike, "*lead l i c"],
  full_block_cnt: Int[ArrayLike, "*lead l i"] | None = None,
  full_block_idx: Int[ArrayLike, "*lead l i f"] | None = None,
  **sizes: Any,
) -> BlockLayout:
  """Builds a layout from FlashAttention-4's forward lists; see `from_flex`."""
  return from_flex(
    mask_block_cnt, mask_block_idx, full_block_cnt, full_block_idx, **sizes
  )


def _widened(index, blocks):
  """Repeats the last entry until a list has one place per block."""
  missing = blocks - index.shape[-1]
  if missing <= 0:
    return index[..., :blocks]
  return jnp.pad(
    index, [(0, 0)] * (index.ndim - 1) + [(0, missing)], mode="edge"
  )


def _demoted(layout):
  """Moves a cut-off last key block from the full to the partial lists."""
  last = layout.k_blocks - 1
  order = jnp.arange(layout.full_index.shape[-1], dtype=jnp.int32)
  order = jnp.expand_dims(order, tuple(range(layout.full_index.ndim - 1)))
  valid = order < layout.full_count[..., None]
  whole = valid & (layout.full_index != last)
  moved = jnp.any(valid & ~whole, axis=-1)
  far = jnp.where(whole, layout.full_index, layout.k_blocks)
  full_index = jnp.minimum(jnp.sort(far, axis=-1), last)
  index = jnp.pad(
    layout.partial_index, [(0, 0)] * (layout.partial_index.ndim - 1) + [(0, 1)]
  )
  put = lambda i, n, m: i.at[n].set(jnp.where(m, last, i[n]))
  index = layout.over_rows(put, index, layout.partial_count, moved)
  return dataclasses.replace(
    layout,
    full_count=jnp.sum(whole, axis=-1, dtype=jnp.int32),
    full_index=full_index,
    partial_index=index,
    partial_count=layout.partial_count + moved.astype(jnp.int32),
  )
