"""Builds layouts from patterns, masks, mask functions and segments."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int8

from pallas_kernels.layout import dense, patterns, types
from pallas_kernels.layout.types import BlockLayout, MaskFn


def from_kinds(
  kinds: Int8[Array | np.ndarray, "*lead l i j"],
  *,
  block_q: int,
  block_k: int,
  q_len: int,
  k_len: int,
  mask_fn: MaskFn | None = None,
  full_capacity: int | None = None,
  partial_capacity: int | None = None,
  **leaves: Any,
) -> BlockLayout:
  """Builds a layout from a block map.

  Args:
    kinds: int8 `[*lead, L, q blocks, k blocks]`, 0 hidden, 1 partial, 2 full;
      NumPy (lists are made on the host, as constants) or JAX.
    block_q, block_k, q_len, k_len: static sizes in tokens.
    mask_fn: element mask of partial blocks, see `BlockLayout`.
    full_capacity, partial_capacity: static list lengths. By default what a
      NumPy map needs, or all key blocks for a JAX one. What does not fit is
      dropped from the end of the row and counted in `dropped`.
    **leaves: further fields of `BlockLayout`, such as `partial_mask`.

  Raises:
    ValueError: if the map's shape does not fit the sizes.
  """
  grid = (-(-q_len // block_q), -(-k_len // block_k))
  if kinds.shape[-2:] != grid or kinds.ndim < 3:
    raise ValueError(
      f"kinds has shape {kinds.shape}; for q_len={q_len}, k_len={k_len} and "
      f"blocks of {block_q} x {block_k} it must be [..., heads, {grid[0]}, "
      f"{grid[1]}]"
    )
  xp = np if isinstance(kinds, np.ndarray) else jnp
  if k_len % block_k:
    ragged = np.arange(grid[1]) == grid[1] - 1
    ragged = ragged.reshape((1,) * (kinds.ndim - 1) + (-1,))
    kinds = xp.where(ragged, xp.minimum(kinds, np.int8(1)), kinds)
  if xp is np:
    full_capacity = full_capacity or _longest(kinds == 2)
    partial_capacity = partial_capacity or _longest(kinds == 1)
  full_count, full_index = types.compact(kinds == 2, full_capacity)
  partial_count, partial_index = types.compact(kinds == 1, partial_capacity)
  wanted = xp.sum(kinds > 0, axis=(-2, -1), dtype=np.int32)
  dropped = wanted - xp.sum(full_count + partial_count, axis=-1, dtype=np.int32)
  transpose = _transposed(kinds) if xp is np and not np.any(dropped) else None
  to_jax = lambda tree: jax.tree.map(jnp.asarray, tree)
  return types.BlockLayout(
    *to_jax((full_count, full_index, partial_count, partial_index, dropped)),
    transpose=to_jax(transpose),
    block_q=block_q,
    block_k=block_k,
    q_len=q_len,
    k_len=k_len,
    mask_fn=mask_fn,
    **leaves,
  )


def _longest(chosen):
  return int(np.max(np.sum(chosen, axis=-1), initial=1))


def _transposed(kinds):
  kinds = np.swapaxes(kinds, -1, -2)
  lists = []
  for kind in (2, 1):
    lists += types.compact(kinds == kind, _longest(kinds == kind))
  return types.BlockTranspose(*lists)


def from_pattern(
  pattern: patterns.Pattern,
  *,
  q_len: int,
  k_len: int | None = None,
  block_q: int = 128,
  block_k: int = 128,
) -> BlockLayout:
  """Builds the layout of a static pattern, without looking at elements.

  The lists are computed on the host at trace time, with exact capacities and
  transposes: O(heads * q blocks * k blocks) work, no device work at all.

  Args:
    pattern: a `patterns.Pattern`; one that tells heads apart yields as many
      layout heads, another yields one.
    q_len, k_len: lengths in tokens; `k_len` defaults to `q_len`.
    block_q, block_k: block sizes in tokens.
  """
  k_len = q_len if k_len is None else k_len
  kinds = patterns.block_kinds(pattern, block_q, block_k, q_len, k_len)
  return from_kinds(
    kinds,
    block_q=block_q,
    block_k=block_k,
    q_len=q_len,
    k_len=k_len,
    mask_fn=None if pattern == patterns.Full() else pattern,
  )


def full(
  *,
  q_len: int,
  k_len: int | None = None,
  block_q: int = 128,
  block_k: int = 128,
) -> BlockLayout:
  """The layout that shows everything (dense attention by blocks)."""
  return from_pattern(
    patterns.Full(), q_len=q_len, k_len=k_len, block_q=block_q, block_k=block_k
  )


def from_mask(
  mask: Bool[ArrayLike, "*lead l q k"],
  *,
  block_q: int = 128,
  block_k: int = 128,
  full_capacity: int | None = None,
  partial_capacity: int | None = None,
) -> BlockLayout:
  """Builds a layout from an element mask, inside jit if wished.

  Args:
    mask: bool `[*lead, L, q_len, k_len]`, True where a pair is attended. Its
      partial blocks are kept as `partial_mask`, so memory is that of the mask
      unless `partial_capacity` is given.
    block_q, block_k: block sizes in tokens.
    full_capacity, partial_capacity: static list lengths; what does not fit is
      dropped and counted in `dropped`.

  Raises:
    ValueError: if `mask` has fewer than three axes.
  """
  mask = jnp.asarray(mask, bool)
  if mask.ndim < 3:
    raise ValueError(
      f"mask has shape {mask.shape}; it must be [..., heads, q_len, k_len] "
      "(one head: add an axis)"
    )
  kinds = dense.mask_kinds(mask, block_q, block_k)
  layout = from_kinds(
    kinds,
    block_q=block_q,
    block_k=block_k,
    q_len=mask.shape[-2],
    k_len=mask.shape[-1],
    full_capacity=full_capacity,
    partial_capacity=partial_capacity,
  )
  blocks = dense.block_view(mask, block_q, block_k)
  pick = layout.over_rows(lambda b, i: b[i], blocks, layout.partial_index)
  return dataclasses.replace(layout, partial_mask=pick)


def from_mask_fn(
  mask_fn: MaskFn,
  *,
  q_len: int,
  k_len: int | None = None,
  heads: int = 1,
  block_q: int = 128,
  block_k: int = 128,
  full_capacity: int | None = None,
  partial_capacity: int | None = None,
) -> BlockLayout:
  """Builds a layout from any element mask function, inside jit if wished.

  Evaluates the function one block row at a time: O(block_q * k_len) memory,
  O(q_len * k_len) work. A `Pattern` needs neither; use `from_pattern`.

  Args:
    mask_fn: callable `(h, q, k) -> bool`, see `BlockLayout`.
    q_len, k_len: lengths in tokens; `k_len` defaults to `q_len`.
    heads: layout heads; more than one if the function tells heads apart.
    block_q, block_k: block sizes in tokens.
    full_capacity, partial_capacity: static list lengths, default all blocks.
  """
  k_len = q_len if k_len is None else k_len
  k = jnp.arange(k_len, dtype=jnp.int32)[None, :]

  def block_row(at):
    h, start = at
    q = start + jnp.arange(block_q, dtype=jnp.int32)[:, None]
    shown = jnp.broadcast_to(mask_fn(h, q, k), (block_q, k_len))
    rows = jnp.minimum(q, q_len - 1) - start  # Padding repeats the last row.
    return dense.mask_kinds(shown[rows[:, 0]], block_q, block_k)[0]

  starts = jnp.arange(0, q_len, block_q, dtype=jnp.int32)
  h, start = jnp.meshgrid(
    jnp.arange(heads, dtype=jnp.int32), starts, indexing="ij"
  )
  kinds = jax.lax.map(block_row, (h.ravel(), start.ravel()))
  return from_kinds(
    kinds.reshape(heads, starts.size, -1),
    block_q=block_q,
    block_k=block_k,
    q_len=q_len,
    k_len=k_len,
    mask_fn=mask_fn,
    full_capacity=full_capacity,
    partial_capacity=partial_capacity,
  )
