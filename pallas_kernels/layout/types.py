"""BlockLayout: which key blocks each query block sees, as lists.

The contract that every implementation builds on:

*   Block `(i, j)` holds queries `i*block_q ...` and keys `j*block_k ...`. The
    lists are per leading index, layout head and query block. **Full** blocks
    show every pair and are never masked. **Partial** blocks are masked
    elementwise, by the conjunction of whatever is present of: `k < k_len`,
    `mask_fn`, `partial_mask`, and equal segment ids. A pair in no listed block
    is not attended. No block is listed twice in one row.
*   The last key block is never full when `block_k` does not divide `k_len`.
    Queries beyond `q_len` may be computed: their results are thrown away.
*   Only the first `count` entries of a list mean anything. The others are
    valid block numbers (safe to prefetch) and must not influence a result.
    The order inside a list is free; constructors emit ascending order.
*   Layout heads: with H query heads and L layout heads (L divides H), query
    head h reads list `h // (H // L)`. `mask_fn` always gets h itself.
*   `mask_fn(h, q, k)`: h an int32 scalar, q and k int32 of one rank,
    broadcastable; elementwise operators only, no captured arrays, hashable.
    Where `partial_tag` is present, each partial block has an int32 tag and the
    call is `mask_fn(h, q, k, tag)`: unions of layouts with different mask
    functions need it. `apply_mask_fn` makes the right call.
*   `partial_mask[..., i, t]` belongs to entry t of the partial list of query
    block i. The transposed partial list carries `partial_slot`, that t, to
    find tag and mask from the key side.

Everything is shape-static, so a layout is built inside jit without a host
sync, passes through jit, vmap and scan, and may be returned and reused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Bool, Float32, Int8, Int32

from pallas_kernels.layout import dense, frame

# NumPy or JAX.
Array = Any
# `mask_fn(h, q, k)` or `mask_fn(h, q, k, tag)`.
MaskFn = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class BlockTranspose:
  """For each key block, the query blocks that list it.

  Attributes:
    full_count: int32 `[*lead, L, k blocks]`.
    full_index: int32 `[*lead, L, k blocks, capacity]`, query block numbers.
    partial_count: int32 `[*lead, L, k blocks]`.
    partial_index: int32 `[*lead, L, k blocks, capacity']`.
    partial_slot: int32 like `partial_index`: where in the query block's
      partial list this block stands. None unless the layout has a tag or mask.
  """

  full_count: Array
  full_index: Array
  partial_count: Array
  partial_index: Array
  partial_slot: Array | None = None


@dataclasses.dataclass(frozen=True)
class BlockLayout:
  """Lists of visible key blocks per query block; see the module's contract.

  Attributes:
    full_count: int32 `[*lead, L, q blocks]`.
    full_index: int32 `[*lead, L, q blocks, capacity]`, key block numbers.
    partial_count: int32 `[*lead, L, q blocks]`.
    partial_index: int32 `[*lead, L, q blocks, capacity']`.
    dropped: int32 `[*lead, L]`, how many wanted blocks (at least) did not fit
      the static capacity. Zero for a layout that says what it was asked to.
    partial_tag: int32 like `partial_index`, or None.
    partial_mask: bool `[*lead, L, q blocks, capacity', block_q, block_k]`, or
      None.
    q_segments, k_segments: int32 `[*lead, q_len]`, `[*lead, k_len]`, or None.
    transpose: the lists per key block, or None; `with_transpose` adds them.
    block_q, block_k, q_len, k_len: static sizes in tokens.
    mask_fn: static element mask of partial blocks, or None.
  """

  full_count: Array
  full_index: Array
  partial_count: Array
  partial_index: Array
  dropped: Array
  partial_tag: Array | None = None
  partial_mask: Array | None = None
  q_segments: Array | None = None
  k_segments: Array | None = None
  transpose: BlockTranspose | None = None
  block_q: int = 128
  block_k: int = 128
  q_len: int = 0
  k_len: int = 0
  mask_fn: MaskFn | None = None

  @property
  def lead(self) -> tuple[int, ...]:
    """Leading (batch) dimensions, possibly empty."""
    return self.full_count.shape[:-2]

  @property
  def heads(self) -> int:
    """Number of layout heads; it divides the number of query heads."""
    return self.full_count.shape[-2]

  @property
  def q_blocks(self) -> int:
    return -(-self.q_len // self.block_q)

  @property
  def k_blocks(self) -> int:
    return -(-self.k_len // self.block_k)

  @property
  def capacity(self) -> tuple[int, int]:
    """Static lengths of the lists: `(full, partial)`."""
    return self.full_index.shape[-1], self.partial_index.shape[-1]

  def density(self) -> Float32[jax.Array, "*lead l"]:
    """Share of listed blocks, float32 `[*lead, L]`."""
    listed = jnp.sum(self.full_count + self.partial_count, axis=-1)
    return listed / np.float32(max(self.q_blocks * self.k_blocks, 1))

  def kinds(self) -> Int8[jax.Array, "*lead l i j"]:
    """Block map int8 `[*lead, L, q blocks, k blocks]`: 0 no, 1 part, 2 all."""

    def row(fc, fi, pc, pi):
      kind = jnp.zeros((self.k_blocks,), jnp.int8)
      kind = kind.at[fi].max(_valid(fi, fc).astype(jnp.int8) * jnp.int8(2))
      return kind.at[pi].max(_valid(pi, pc).astype(jnp.int8))

    return self.over_rows(
      row,
      self.full_count,
      self.full_index,
      self.partial_count,
      self.partial_index,
    )

  def slots(self) -> Int32[jax.Array, "*lead l i j"]:
    """Place of each block in its row's partial list, int32 like `kinds`."""

    def row(count, index):
      where = jnp.where(_valid(index, count), index, self.k_blocks)
      slot = jnp.zeros((self.k_blocks,), jnp.int32)
      order = jnp.arange(index.shape[0], dtype=jnp.int32)
      return slot.at[where].set(order, mode="drop")

    return self.over_rows(row, self.partial_count, self.partial_index)

  def over_rows(self, fn: Callable[..., Any], *values: Any) -> Any:
    """Maps `fn` over the leading, head and query block axes."""
    for _ in range(self.full_count.ndim):
      fn = jax.vmap(fn)
    return fn(*values)

  def with_transpose(self, capacity: int | None = None) -> "BlockLayout":
    """Adds the lists per key block, if they are missing.

    Args:
      capacity: static length of the transposed lists; by default the number of
        query blocks, which always suffices. A shorter one must be known to
        suffice: gradients of what does not fit would be lost.
    """
    if self.transpose is not None:
      return self
    kinds = jnp.swapaxes(self.kinds(), -1, -2)
    full_count, full_index = compact(kinds == 2, capacity)
    partial_count, partial_index = compact(kinds == 1, capacity)
    slot = None
    if self.partial_tag is not None or self.partial_mask is not None:
      by_key = jnp.swapaxes(self.slots(), -1, -2)
      slot = jnp.take_along_axis(by_key, partial_index, axis=-1)
    return dataclasses.replace(
      self,
      transpose=BlockTranspose(
        full_count, full_index, partial_count, partial_index, slot
      ),
    )

  def to_dense(self) -> Bool[jax.Array, "*lead l q k"]:
    """Element mask bool `[*lead, L, q_len, k_len]`; O(S^2), for tests only."""
    return dense.to_dense(self)

  def expand_heads(self, heads: int) -> "BlockLayout":
    """The same layout with `heads` layout heads, one per query head."""
    return frame.expand_heads(self, heads)

  def __and__(self, other: "BlockLayout") -> "BlockLayout":
    """Pairs that both layouts show: `algebra.intersect`."""
    return _operators["&"](self, other)

  def __or__(self, other: "BlockLayout") -> "BlockLayout":
    """Pairs that either layout shows: `algebra.union`."""
    return _operators["|"](self, other)


_operators: dict[str, Callable[[BlockLayout, BlockLayout], BlockLayout]] = {}


def define_operators(intersect, union):
  """Says what `a & b` and `a | b` do: called once, by `algebra`.

  Set operations build new layouts and so stand above this module.
  """
  _operators.update({"&": intersect, "|": union})


_STATIC = ("block_q", "block_k", "q_len", "k_len", "mask_fn")
jax.tree_util.register_dataclass(
  BlockTranspose, [f.name for f in dataclasses.fields(BlockTranspose)], []
)
jax.tree_util.register_dataclass(
  BlockLayout,
  [f.name for f in dataclasses.fields(BlockLayout) if f.name not in _STATIC],
  list(_STATIC),
)


def _valid(index, count):
  return jnp.arange(index.shape[-1], dtype=jnp.int32) < count


def compact(chosen, capacity=None):
  """Turns a boolean map into lists, in ascending order.

  Args:
    chosen: bool `[..., n]`, NumPy or JAX; the result is of the same kind.
    capacity: static list length, by default n. At least one entry is kept, so
      that a list can always be read.

  Returns:
    Counts int32 `[...]`, at most `capacity`, and indices int32
    `[..., capacity]`; entries beyond the count are valid numbers.
  """
  xp = np if isinstance(chosen, np.ndarray) else jnp
  n = chosen.shape[-1]
  capacity = max(1, n if capacity is None else min(capacity, n))
  number = xp.broadcast_to(xp.arange(n, dtype=np.int32), chosen.shape)
  index = xp.sort(xp.where(chosen, number, np.int32(n)), axis=-1)
  count = xp.sum(chosen, axis=-1, dtype=np.int32)
  index = xp.minimum(index[..., :capacity], np.int32(max(n - 1, 0)))
  return xp.minimum(count, np.int32(capacity)), index


def apply_mask_fn(
  mask_fn: MaskFn, h: Array, q: Array, k: Array, tag: Array | None = None
) -> Array:
  """Calls `mask_fn` with the block's tag where the layout has tags."""
  return mask_fn(h, q, k) if tag is None else mask_fn(h, q, k, tag)
