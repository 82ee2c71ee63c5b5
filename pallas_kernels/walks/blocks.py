"""Walks the lists of a few query blocks at a time, for the XLA path.

A **cell** is a query block of one example and of all heads that share its
lists and its keys: the rows of its products are those of block_q tokens, of
each token one for each head. A loop takes bundles of cells, and in each visits
the listed key blocks with batched matrix products on what it gathers. Cells
whose lists are equally long go together, so that hardly anything beyond the
lists is computed. Full blocks go several at a time (longer products), then
fewer, then one by one.

XLA on a CPU gives a batched product of few keys to one thread in JAX 0.10 (not
in 0.11), and one of a cell alone to several if it has some 500 rows: heads that
share lists, and large blocks, are faster there.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels import aot
from pallas_kernels.walks import hidden, int32, numerics

# Full blocks visited together while the lists are that long. Shorter lists than
# the first number says are visited at once.
_TOGETHER = (8, 3, 1)
# Most rows in a bundle; and its scores, which a CPU's caches have to hold.
_CPU_ROWS, _ROWS, _CPU_SCORES = 1024, 8192, 2**19


class Cells(NamedTuple):
  """Query blocks of a bundle, int32 `[W]` each.

  Attributes:
    b, h, g, i: batch, first head, key head and query block numbers.
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


def shared(operands):
  """How many heads a cell has: those that share lists and keys."""
  heads = operands.q.shape[2]
  return math.gcd(heads // operands.k.shape[2], heads // operands.layout.heads)


def bundles(operands):
  """Number of bundles, and the function from 0 ... n-1 to `Cells`."""
  layout = operands.layout
  batch, _, heads, _ = operands.q.shape
  rows, group = layout.q_blocks, heads // operands.k.shape[2]
  together = shared(operands)
  sets = heads // together
  total = batch * sets * rows
  # On a CPU more rows where lists are short.
  fitting = min(_CPU_ROWS, _CPU_SCORES // (layout.block_k * _at_once(layout)))
  most = fitting if _in_order() else _ROWS
  width = min(total, max(1, most // (layout.block_q * together)))
  longest = layout.full_count * (layout.partial_index.shape[-1] + 1)
  longest = jnp.repeat(
    longest + layout.partial_count, sets // layout.heads, axis=1
  )
  longest = jnp.broadcast_to(longest, (batch, sets, rows))
  order = jnp.argsort(longest.reshape(-1)).astype(jnp.int32)
  fill = -total % width
  order = jnp.concatenate([jnp.repeat(order[:1], fill), order])

  def bundle(n):
    at = n * width + jnp.arange(width, dtype=jnp.int32)
    cell = order[at]
    h = cell // rows % sets * together
    return Cells(cell // (rows * sets), h, h // group, cell % rows, at >= fill)

  return order.shape[0] // width, bundle


def _at_once(layout):
  """How many full blocks are visited together while lists are long."""
  return max(1, min(_TOGETHER[0], layout.full_index.shape[-1]))


def take(operands, x, cells):
  """Rows of the cells: `[W, block_q * shared heads, D]` of `[B, Q, H, D]`."""
  size, heads = operands.layout.block_q, shared(operands)

  def one(b, h, i):
    start = (b, i * size, h, 0)
    rows = int32.read(x, start, (1, size, heads, x.shape[-1]))
    return rows.reshape(size * heads, x.shape[-1])

  return jax.vmap(one)(cells.b, cells.h, cells.i)


def take_line(operands, x, cells):
  """Numbers of the cells' rows, `[W, rows]` of `[B, H, Q]`."""
  size, heads = operands.layout.block_q, shared(operands)

  def one(b, h, i):
    line = int32.read(x, (b, h, i * size), (1, heads, size))
    return line.reshape(heads, size).T.reshape(-1)

  return jax.vmap(one)(cells.b, cells.h, cells.i)


def take_keys(operands, x, cells, blocks):
  """Numbers of key blocks `[W, n]` for each shared head.

  `[W, 1, heads, n * block_k]` of `[B, H, K]`, or with one head of `[B, G, K]`.
  """
  size = operands.layout.block_k
  own = x.shape[1] == operands.q.shape[2]
  heads, first = (shared(operands), cells.h) if own else (1, cells.g)

  def one(b, h, block):
    return int32.read(x, (b, h, block * size), (1, heads, size))[0]

  several = jax.vmap(one, (None, None, 0), out_axes=1)
  found = jax.vmap(several)(cells.b, first, blocks)
  return found.reshape(blocks.shape[0], 1, heads, -1)


def heads_of(operands, cells):
  """The heads of the cells, int32 `[W, heads]`."""
  return _from(cells.h, shared(operands))


def _from(start, n):
  """n numbers from each start on, `[W, n]` of `[W]`."""
  return start[:, None] + jnp.arange(n, dtype=jnp.int32)[None]


def by_head(operands, x):
  """Rows by token and head: `[W, block_q, heads, n]` of `[W, rows, n]`."""
  return x.reshape(x.shape[0], -1, shared(operands), x.shape[-1])


def put(operands, x, cells, rows):
  """x, `[B, Q, H, D]` or `[B, H, Q]`, with the cells' rows in their place.

  Rows are `[W, rows, D]` or `[W, rows]`.
  """
  size, heads = operands.layout.block_q, shared(operands)
  rows = rows.reshape(rows.shape[0], size, heads, *rows.shape[2:])
  lines = x.ndim == 3
  if not _in_order():
    # Outside of x for cells that only fill up.
    b = jnp.where(cells.live, cells.b, x.shape[0])[:, None, None]
    token = _from(cells.i * size, size)[:, :, None]
    h = heads_of(operands, cells)[:, None]
    at = (b, h, token) if lines else (b, token, h)
    return x.at[at].set(rows, mode="drop")

  def one(n, x):
    b, h, token = cells.b[n], cells.h[n], cells.i[n] * size
    if lines:
      return int32.write(x, rows[n].T[None], (b, h, token))
    return int32.write(x, rows[n][None], (b, token, h, 0))

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
    parts: for each, `[W, D, n * block_k]`, `[W, heads, n * block_k]` or
      `[W, heads, n]`. Columns, because of the two factors of their product the
      queries are the smaller one to turn.

  Returns:
    The new sums.
  """
  width, count = blocks.shape
  if not _in_order():
    return _scatter_to_keys(cells, blocks, sums, parts)

  def window(cell, j, rank, rows, size):
    """Where a part of one key block goes, and its shape there."""
    if rank == 5:
      return (cell.b, cell.g, j, 0, 0), (1, 1, 1, rows, size)
    if rank == 3:
      return (cell.b, cell.h, j * size), (1, rows, size)
    return (cell.b, cell.h, cell.i, j), (1, rows, 1, 1)

  def one(u, sums):
    n, t = u // count, u % count
    cell, j, new = cells.pick(n), blocks[n, t], []
    for total, part in zip(sums, parts, strict=True):
      if total is not None:
        size = part.shape[-1] // count
        part = lax.dynamic_slice_in_dim(part[n], t * size, size, -1)
        start, shape = window(cell, j, total.ndim, *part.shape)
        old = int32.read(total, start, shape)
        total = int32.write(total, old + part.reshape(shape), start)
      new.append(total)
    return tuple(new)

  return lax.fori_loop(0, width * count, one, tuple(sums))


def _scatter_to_keys(cells, blocks, sums, parts):
  """`add_to_keys` at once; a GPU adds in no fixed order."""
  count = blocks.shape[1]
  b, _, g, i, _ = (x[:, None] for x in cells)
  new = []
  for total, part in zip(sums, parts, strict=True):
    if total is not None:
      size = part.shape[-1] // count
      # [W, n, D or heads, block_k]
      part = jnp.moveaxis(part.reshape(part.shape[:-1] + (count, size)), 2, 1)
      heads = _from(cells.h, part.shape[2])[:, None]
      if total.ndim == 5:
        total = total.at[b, g, blocks].add(part)
      elif total.ndim == 3:
        rows = total.reshape(total.shape[:2] + (-1, size))
        rows = rows.at[b[..., None], heads, blocks[..., None]].add(part)
        total = rows.reshape(total.shape)
      else:
        at = b[..., None], heads, i[..., None], blocks[..., None]
        total = total.at[at].add(part[..., 0])
    new.append(total)
  return tuple(new)


def walk(operands, cells, visit, state):
  """Visits the blocks of the lists of a bundle.

  Args:
    operands: `contract.Operands`.
    cells: the query blocks.
    visit: `(state, blocks, mask) -> state` with key block numbers `[W, n]`;
      mask is bool, broadcasting to `[W, rows, n * block_k]`, or None if all
      is visible.
    state: a pytree carried through the visits.
  """
  layout = operands.layout
  row = lambda leaf: jax.vmap(lambda cell: _row(operands, leaf, cell))(cells)
  within = lambda count: jnp.where(cells.live, row(count), 0)
  count, index = within(layout.full_count), row(layout.full_index)
  partial_index = row(layout.partial_index)
  partial_count = within(layout.partial_count)

  def partial(t, state):
    blocks, mask = _entries(partial_index, partial_count, t)
    masks = jax.vmap(lambda cell, j: _mask(operands, cell, j, t))
    shown = masks(cells, blocks[:, 0])
    return visit(state, blocks, mask if shown is None else mask & shown)

  start = 0
  most = _at_once(layout)
  for n in (most, *(n for n in _TOGETHER if n < most)):

    def several(t, state, start=start, n=n):
      blocks, mask = _entries(index, count, start + t * n, n)
      return visit(state, blocks, None if n > 1 else mask)

    # Several at a time as far as the lists of all cells are that long.
    turns = (jnp.min(count) - start) // n if n > 1 else jnp.max(count) - start
    state = lax.fori_loop(0, turns, several, state)
    start = start + turns * n
  return lax.fori_loop(0, jnp.max(partial_count), partial, state)


def _row(operands, leaf, cell):
  """The cell's entry of a layout leaf `[B or 1, L, q blocks, ...]`."""
  layout, heads = operands.layout, operands.q.shape[2]
  b = cell.b if layout.full_count.shape[0] > 1 else 0
  return leaf[b, cell.h // (heads // layout.heads), cell.i]


def _entries(index, count, t, n=1):
  """n entries of the lists from t on: `[W, n]`, and if all count `[W, 1, 1]`.

  They have to depend on t. In lists with room for one turn nothing else would:
  XLA would do the visit's products before the loop, for shorter lists too.
  """
  valid = (t + n <= count)[:, None]
  entries = lax.dynamic_slice_in_dim(index, t, n, 1)
  return jnp.where(valid, entries, 0), valid[..., None]


def _mask(operands, cell, j, t):
  """Element mask of partial entry t of one cell, key block j: `[rows, bk]`."""
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

  def of_head(h):
    mask = numerics.element_mask(
      layout,
      h,
      q[:, None],
      k[None, :],
      tag=pick(layout.partial_tag),
      stored=pick(layout.partial_mask),
      **segments,
    )
    block = (layout.block_q, layout.block_k)
    return None if mask is None else jnp.broadcast_to(mask, block)

  together = jnp.arange(shared(operands), dtype=jnp.int32)
  mask = jax.vmap(of_head, out_axes=1)(cell.h + together)
  return None if mask is None else mask.reshape(-1, layout.block_k)


def logits(operands, params, cells, q, blocks, k, mask, marks=None):
  """Scores of query blocks against chosen key blocks.

  Args:
    operands, params: the call.
    cells: the query blocks.
    q: `[W, rows, D]`, not scaled.
    blocks: key block numbers `[W, n]`.
    k: `[W, n * block_k, D]`.
    mask: as `walk` gives it.
    marks: of `hidden.marks`; None: k is finite, and so is to be the bias.

  Returns:
    Capped scores, and logits (with bias, -inf where hidden).
  """
  s = params.scale * jnp.matmul(q, k.mT, precision=params.precision)
  capped = numerics.capped(s, params.soft_cap)
  value = by_head(operands, capped)
  if marks is not None:
    value = value + take_keys(operands, marks, cells, blocks)
  if operands.bias is not None:
    bias = take_keys(operands, operands.bias, cells, blocks)
    if marks is None:
      bias = hidden.plain_bias(bias)
    value = jnp.where(jnp.isneginf(bias), -jnp.inf, value + bias)
  value = value.reshape(s.shape)
  if mask is not None:
    value = jnp.where(mask, value, -jnp.inf)
  return capped, value


def keys(x, layout, cells, blocks, dtype):
  """Rows of key or value blocks, `[W, n * block_k, D]`."""
  size, width = layout.block_k, x.shape[-1]

  def one(b, g, block):
    return int32.read(x, (b, block * size, g, 0), (1, size, 1, width))

  rows = jax.vmap(jax.vmap(one, (None, None, 0)))(cells.b, cells.g, blocks)
  return rows.reshape(blocks.shape[0], -1, width).astype(dtype)


def finite_keys(x, layout, cells, blocks, dtype):
  """The same with zeros for what is not finite; costs nothing but a select."""
  return hidden.plain(keys(x, layout, cells, blocks, dtype))
