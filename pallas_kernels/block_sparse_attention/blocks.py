"""Walks the lists of one query block, for the XLA path.

A loop over (batch, head, query block) visits each listed block with plain 2-D
matrix products on slices: XLA on CPU runs these near its matmul peak, while
many small batched products, or gathered copies, are several times slower.
Full blocks go several at a time (longer products), then one by one, so that
nothing beyond the lists is computed.
"""

from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp

from pallas_kernels.block_sparse_attention import numerics

# Full blocks visited together while a list is that long.
_TOGETHER = 8


class Cell(NamedTuple):
  """One query block: batch, head, key head and query block numbers."""

  b: Any
  h: Any
  g: Any
  i: Any


def cells(operands):
  """Number of cells, and the function from 0 ... n-1 to a `Cell`."""
  batch, _, heads, _ = operands.q.shape
  rows = operands.layout.q_blocks
  group = heads // operands.k.shape[2]

  def cell(n):
    h = n // rows % heads
    return Cell(n // (rows * heads), h, h // group, n % rows)

  return batch * heads * rows, cell


def _row(layout, leaf, cell, heads):
  """The cell's entry of a layout leaf `[B or 1, L, q blocks, ...]`."""
  b = cell.b if layout.full_count.shape[0] > 1 else 0
  return leaf[b, cell.h // (heads // layout.heads), cell.i]


def take(x, cell, head, block, size):
  """Rows of one block: `[size, D]` of `[B, S, heads, D]`."""
  start = (cell.b, block * size, head, 0)
  return lax.dynamic_slice(x, start, (1, size, 1, x.shape[-1])).reshape(
    size, x.shape[-1]
  )


def add(x, cell, head, block, rows):
  """Adds `rows` `[size, D]` to one block of `[B, S, heads, D]`."""
  old = take(x, cell, head, block, rows.shape[0])
  return put(x, cell, head, block, old + rows)


def put(x, cell, head, block, rows):
  """Writes `rows` `[size, D]` to one block of `[B, S, heads, D]`."""
  start = (cell.b, block * rows.shape[0], head, 0)
  return lax.dynamic_update_slice(x, rows[None, :, None, :], start)


def take_line(x, cell, block, size):
  """One block `[size]` of a row of `[B, H, S]`."""
  start = (cell.b, cell.h, block * size)
  return lax.dynamic_slice(x, start, (1, 1, size)).reshape(size)


def add_line(x, cell, block, line):
  """Adds `line` `[size]` to one block of a row of `[B, H, S]`."""
  line = take_line(x, cell, block, line.shape[0]) + line
  start = (cell.b, cell.h, block * line.shape[0])
  return lax.dynamic_update_slice(x, line[None, None, :], start)


def walk(operands, cell, visit, state):
  """Visits the blocks of a cell's lists.

  Args:
    operands: `contract.Operands`.
    cell: the query block.
    visit: `(state, blocks, mask) -> state` with a tuple of key block numbers;
      mask is bool, broadcasting to `[block_q, len(blocks) * block_k]`, or
      None if all is visible.
    state: a pytree carried through the visits.
  """
  layout, heads = operands.layout, operands.q.shape[2]
  row = lambda leaf: _row(layout, leaf, cell, heads)
  count, index = row(layout.full_count), row(layout.full_index)
  together = min(_TOGETHER, index.shape[0])
  chunks = count // together if together > 1 else 0

  def several(t, state):
    at = t * together
    return visit(state, tuple(index[at + u] for u in range(together)), None)

  def one(t, state):
    return visit(state, (_entry(index, count, t),), None)

  partial_count = row(layout.partial_count)

  def partial(t, state):
    j = _entry(row(layout.partial_index), partial_count, t)
    return visit(state, (j,), _mask(operands, cell, row, j, t))

  if together > 1:
    state = lax.fori_loop(0, chunks, several, state)
  state = lax.fori_loop(chunks * together, count, one, state)
  return lax.fori_loop(0, partial_count, partial, state)


def _entry(index, count, t):
  """Entry t of a list, which has to depend on t.

  In a list with room for one block nothing else would: XLA would do the visit's
  products before the loop, in each cell whose list is empty too.
  """
  return jnp.where(t < count, index[t], 0)


def _mask(operands, cell, row, j, t):
  """Element mask of partial entry t of the cell, key block j."""
  layout = operands.layout
  q = cell.i * layout.block_q + jnp.arange(layout.block_q, dtype=jnp.int32)
  k = j * layout.block_k + jnp.arange(layout.block_k, dtype=jnp.int32)
  segments = {}
  if layout.q_segments is not None:
    b = cell.b if layout.full_count.shape[0] > 1 else 0
    cut = lambda x, block, size: lax.dynamic_slice(
      x, (b, block * size), (1, size)
    )
    q_ids = cut(layout.q_segments, cell.i, layout.block_q)
    segments["q_segments"] = q_ids.reshape(-1, 1)
    segments["k_segments"] = cut(layout.k_segments, j, layout.block_k)
  pick = lambda leaf: None if leaf is None else row(leaf)[t]
  return numerics.element_mask(
    layout,
    cell.h,
    q[:, None],
    k[None, :],
    tag=pick(layout.partial_tag),
    stored=pick(layout.partial_mask),
    **segments,
  )


def logits(operands, params, cell, q, blocks, k, mask):
  """Scores of a query block against chosen key blocks.

  Args:
    operands, params: the call.
    cell: the query block.
    q: `[block_q, D]`, not scaled.
    blocks: key block numbers.
    k: `[len(blocks) * block_k, D]`.
    mask: as `walk` gives it.

  Returns:
    Capped scores, and logits (with bias, -inf where hidden).
  """
  s = params.scale * jnp.dot(q, k.T, precision=params.precision)
  capped = numerics.capped(s, params.soft_cap)
  value = capped
  if operands.bias is not None:
    size = operands.layout.block_k
    bias = jnp.concatenate(
      [take_line(operands.bias, cell, j, size) for j in blocks]
    )
    value = value + bias[None, :]
  if mask is not None:
    value = jnp.where(mask, value, -jnp.inf)
  return capped, value


def keys(x, layout, cell, blocks, dtype):
  """Rows of key or value blocks, `[len(blocks) * block_k, D]`."""
  rows = [take(x, cell, cell.g, j, layout.block_k) for j in blocks]
  return jnp.concatenate(rows).astype(dtype)
