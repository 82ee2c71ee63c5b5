"""Walks the lists of a few query blocks at a time, for the XLA path.

A **cell** is a query block of one head of one example. A loop takes bundles of
cells, and in each visits the listed key blocks with batched matrix products on
what it gathers: XLA on a CPU gives the cells of a bundle to different cores,
which it does not do with the products of one cell, and accelerators need many
at once. Cells whose lists are equally long go together, so that hardly anything
beyond the lists is computed. Full blocks go several at a time (longer
products), then one by one.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import aot
from pallas_kernels.walks import hidden, int32, numerics

# Full blocks visited together while the lists are that long.
_TOGETHER = 8
# Queries in a bundle: on a CPU what the caches hold with their scores.
_CPU_QUERIES, _QUERIES = 512, 8192


class Cells(NamedTuple):
  """Query blocks of a bundle, int32 `[W]` each.

  Attributes:
    b, h, g, i: batch, head, key head and query block numbers.
    live: bool; another one fills the first bundle up: it stands for the same
      query block as the first live one, before it, and its lists are empty.
  """

  b: Any
  h: Any
  g: Any
  i: Any
  live: Any

  def pick(self, n):
    """The same for cell n alone (scalars)."""
    return Cells(*(x[n] for x in self))


def bundles(operands):
  """Number of bundles, and the function from 0 ... n-1 to `Cells`."""
  layout = operands.layout
  batch, _, heads, _ = operands.q.shape
  rows, group = layout.q_blocks, heads // operands.k.shape[2]
  total = batch * heads * rows
  queries = _CPU_QUERIES if _in_order() else _QUERIES
  width = min(total, max(1, queries // layout.block_q))
  longest = layout.full_count * (layout.partial_index.shape[-1] + 1)
  longest = jnp.repeat(
    longest + layout.partial_count, heads // layout.heads, axis=1
  )
  longest = jnp.broadcast_to(longest, (batch, heads, rows))
  order = jnp.argsort(longest.reshape(-1)).astype(jnp.int32)
  fill = -total % width
  order = jnp.concatenate([jnp.repeat(order[:1], fill), order])

  def bundle(n):
    at = n * width + jnp.arange(width, dtype=jnp.int32)
    cell = order[at]
    h = cell // rows % heads
    return Cells(cell // (rows * heads), h, h // group, cell % rows, at >= fill)

  return order.shape[0] // width, bundle


def take(x, cells, head, block, size):
  """Rows of blocks: `[..., size, D]` of `[B, S, heads, D]`.

  Args:
    x: the array.
    cells: whose examples.
    head, block: int32 `[W]`, and `[W]` or `[W, n]`.
    size: tokens of a block.
  """

  def one(b, head, block):
    start = (b, block * size, head, 0)
    rows = int32.read(x, start, (1, size, 1, x.shape[-1]))
    return rows.reshape(size, x.shape[-1])

  return _each(one, cells, head, block)


def take_line(x, cells, block, size):
  """Blocks `[..., size]` of rows of `[B, H, S]`; see `take`."""

  def one(b, h, block):
    start = (b, h, block * size)
    return int32.read(x, start, (1, 1, size)).reshape(size)

  return _each(one, cells, cells.h, block)


def _each(one, cells, head, block):
  """Maps `one(b, head, block)` over the cells, and over several blocks each."""
  if block.ndim == 2:
    one = jax.vmap(one, (None, None, 0))
  return jax.vmap(one)(cells.b, head, block)


def put(x, cells, rows):
  """Writes query blocks: `[W, block_q, D]` to `[B, S, H, D]`, or lines.

  Lines are `[W, block_q]`, written to `[B, H, S]`.
  """
  size = rows.shape[1]
  if not _in_order():
    # Outside of x for cells that only fill up.
    b = jnp.where(cells.live, cells.b, x.shape[0])[:, None]
    h, offset = cells.h[:, None], jnp.arange(size, dtype=jnp.int32)[None, :]
    token = cells.i[:, None] * size + offset
    at = (b, h, token) if rows.ndim == 2 else (b, token, h)
    return x.at[at].set(rows, mode="drop")

  def one(n, x):
    b, h, token = cells.b[n], cells.h[n], cells.i[n] * size
    if rows.ndim == 2:
      return int32.write(x, rows[n][None, None], (b, h, token))
    block = rows[n][None, :, None]
    return int32.write(x, block, (b, token, h, 0))

  return lax.fori_loop(0, rows.shape[0], one, x)


def _in_order():
  """Whether results are written one after the other.

  That is in place and fast on a CPU, where scattering is slow. Accelerators
  scatter those of a bundle at once.
  """
  return aot.platform() == "cpu"


def key_sums(x, block_k, dtype):
  """Zeros for sums of rows like x `[B, K, G, D]`, as `add_to_keys` has them."""
  batch, length, groups, width = x.shape
  shape = (batch, groups, length // block_k, width, block_k)
  return jnp.zeros(shape, dtype)


def by_token(sums, x):
  """`key_sums` in the shape and dtype of x."""
  return jnp.transpose(sums, (0, 2, 4, 1, 3)).reshape(x.shape).astype(x.dtype)


def add_to_keys(cells, blocks, sums, parts):
  """Adds columns, lines or numbers of key blocks to arrays of all of them.

  On a CPU in a loop with one update of each: XLA copies the whole array between
  two updates in one loop body, and updates in place otherwise. Where blocks do
  not count, parts are zero.

  Args:
    cells: the query blocks.
    blocks: key block numbers `[W, n]`.
    sums: tuple of `key_sums`, `[B, H, K]` or `[B, H, q blocks, k blocks]`
      arrays, or None.
    parts: for each, `[W, D, n * block_k]`, `[W, n * block_k]` or `[W, n]`.
      Columns, because of the two factors of their product the queries are the
      smaller one to turn.

  Returns:
    The new sums.
  """
  width, count = blocks.shape
  if not _in_order():
    return _scatter_to_keys(cells, blocks, sums, parts)

  def place(cell, j, rank, size):
    if rank == 5:
      return cell.b, cell.g, j, 0, 0
    return (cell.b, cell.h, j * size) if rank == 3 else (*cell[:2], cell.i, j)

  def one(u, sums):
    n, t = u // count, u % count
    cell, j, new = cells.pick(n), blocks[n, t], []
    for total, part in zip(sums, parts, strict=True):
      if total is not None:
        size = part.shape[-1] // count
        part = lax.dynamic_slice_in_dim(part[n], t * size, size, -1)
        part = part.reshape((1,) * (total.ndim - part.ndim) + part.shape)
        start = place(cell, j, total.ndim, size)
        old = int32.read(total, start, part.shape)
        total = int32.write(total, old + part, start)
      new.append(total)
    return tuple(new)

  return lax.fori_loop(0, width * count, one, tuple(sums))


def _scatter_to_keys(cells, blocks, sums, parts):
  """`add_to_keys` at once; a GPU adds in no fixed order."""
  count = blocks.shape[1]
  b, h, g, i, _ = (x[:, None] for x in cells)
  new = []
  for total, part in zip(sums, parts, strict=True):
    if total is not None:
      size = part.shape[-1] // count
      part = part.reshape(part.shape[:-1] + (count, size))
      if total.ndim == 5:
        total = total.at[b, g, blocks].add(jnp.moveaxis(part, 2, 1))
      elif total.ndim == 3:
        rows = total.reshape(total.shape[:2] + (-1, size))
        total = rows.at[b, h, blocks].add(part).reshape(total.shape)
      else:
        total = total.at[b, h, i, blocks].add(part[..., 0])
    new.append(total)
  return tuple(new)


def walk(operands, cells, visit, state):
  """Visits the blocks of the lists of a bundle.

  Args:
    operands: `contract.Operands`.
    cells: the query blocks.
    visit: `(state, blocks, mask) -> state` with key block numbers `[W, n]`;
      mask is bool, broadcasting to `[W, block_q, n * block_k]`, or None if all
      is visible.
    state: a pytree carried through the visits.
  """
  layout = operands.layout
  row = lambda leaf: jax.vmap(lambda cell: _row(operands, leaf, cell))(cells)
  within = lambda count: jnp.where(cells.live, row(count), 0)
  count, index = within(layout.full_count), row(layout.full_index)
  together = min(_TOGETHER, index.shape[1])
  chunks = jnp.min(count) // together

  def several(t, state):
    blocks, _ = _entries(index, count, t, together)
    return visit(state, blocks, None)

  def one(t, state):
    return visit(state, *_entries(index, count, t))

  partial_index = row(layout.partial_index)
  partial_count = within(layout.partial_count)

  def partial(t, state):
    blocks, mask = _entries(partial_index, partial_count, t)
    masks = jax.vmap(lambda cell, j: _mask(operands, cell, j, t))
    shown = masks(cells, blocks[:, 0])
    return visit(state, blocks, mask if shown is None else mask & shown)

  state = lax.fori_loop(0, chunks, several, state)
  state = lax.fori_loop(chunks * together, jnp.max(count), one, state)
  return lax.fori_loop(0, jnp.max(partial_count), partial, state)


def _row(operands, leaf, cell):
  """The cell's entry of a layout leaf `[B or 1, L, q blocks, ...]`."""
  layout, heads = operands.layout, operands.q.shape[2]
  b = cell.b if layout.full_count.shape[0] > 1 else 0
  return leaf[b, cell.h // (heads // layout.heads), cell.i]


def _entries(index, count, t, n=1):
  """Turn t of the lists, n entries: `[W, n]`, and if all count `[W, 1, 1]`.

  They have to depend on t. In lists with room for one turn nothing else would:
  XLA would do the visit's products before the loop, for shorter lists too.
  """
  valid = ((t + 1) * n <= count)[:, None]
  entries = lax.dynamic_slice_in_dim(index, t * n, n, 1)
  return jnp.where(valid, entries, 0), valid[..., None]


def _mask(operands, cell, j, t):
  """Element mask of partial entry t of one cell, key block j."""
  layout = operands.layout
  q = cell.i * layout.block_q + jnp.arange(layout.block_q, dtype=jnp.int32)
  k = j * layout.block_k + jnp.arange(layout.block_k, dtype=jnp.int32)
  segments = {}
  if layout.q_segments is not None:
    b = cell.b if layout.full_count.shape[0] > 1 else 0
    cut = lambda x, block, size: int32.read(x, (b, block * size), (1, size))
    q_ids = cut(layout.q_segments, cell.i, layout.block_q)
    segments["q_segments"] = q_ids.reshape(-1, 1)
    segments["k_segments"] = cut(layout.k_segments, j, layout.block_k)
  pick = lambda leaf: None if leaf is None else _row(operands, leaf, cell)[t]
  return numerics.element_mask(
    layout,
    cell.h,
    q[:, None],
    k[None, :],
    tag=pick(layout.partial_tag),
    stored=pick(layout.partial_mask),
    **segments,
  )


def logits(operands, params, cells, q, blocks, k, mask, marks=None):
  """Scores of query blocks against chosen key blocks.

  Args:
    operands, params: the call.
    cells: the query blocks.
    q: `[W, block_q, D]`, not scaled.
    blocks: key block numbers `[W, n]`.
    k: `[W, n * block_k, D]`.
    mask: as `walk` gives it.
    marks: of `hidden.marks`; None: k is finite, and so is to be the bias.

  Returns:
    Capped scores, and logits (with bias, -inf where hidden).
  """
  s = params.scale * jnp.matmul(q, k.mT, precision=params.precision)
  capped = numerics.capped(s, params.soft_cap)
  value = capped
  line = lambda x, cells: take_line(
    x, cells, blocks, operands.layout.block_k
  ).reshape(blocks.shape[0], 1, -1)
  if marks is not None:
    value = value + line(marks, cells._replace(h=cells.g))
  if operands.bias is not None:
    bias = line(operands.bias, cells)
    if marks is None:
      bias = hidden.plain_bias(bias)
    value = jnp.where(jnp.isneginf(bias), -jnp.inf, value + bias)
  if mask is not None:
    value = jnp.where(mask, value, -jnp.inf)
  return capped, value


def keys(x, layout, cells, blocks, dtype):
  """Rows of key or value blocks, `[W, n * block_k, D]`."""
  rows = take(x, cells, cells.g, blocks, layout.block_k)
  return rows.reshape(rows.shape[0], -1, rows.shape[-1]).astype(dtype)


def finite_keys(x, layout, cells, blocks, dtype):
  """The same with zeros for what is not finite; costs nothing but a select."""
  return hidden.plain(keys(x, layout, cells, blocks, dtype))
