"""What the TPU kernels do to one tile of scores, `[resident, streamed]`.

Exponentials are taken to base 2, which is what the hardware computes: logits
and log-sum-exps inside the kernels are in units of log 2.
"""

import functools
import math
import operator

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.walks import numerics, tpu_plan

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LANES = tpu_plan.LANES
# Rows of the smallest tile, of 16-bit numbers too.
SUBLANES = 16


def product(a, b, axis_a, axis_b, precision):
  """Product of two matrices over one axis of each, in float32."""
  if a.dtype != jnp.float32:
    precision = None  # One pass is exact already.
  return lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def plain(x):
  """`hidden.plain` of a tile: Mosaic has no isfinite of 16-bit numbers."""
  return jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, x, 0)


def nan_of_rows(x):
  """NaN for rows `[n, d]` that hold something not finite, else 0: `[1, n]`.

  A product with few rows, which turns a column into a line on the way.
  """
  ones = jnp.ones((SUBLANES, x.shape[1]), x.dtype)
  return product(ones, x * 0, 1, 1, None)[:1]


def column(line):
  """`[1, n]` along lanes to `[n, 128]`, every lane alike."""
  return jnp.transpose(jnp.broadcast_to(line, (LANES, line.shape[1])))


def line(column):
  """The inverse of `column`."""
  return jnp.transpose(column)[:1]


def spread(column, width):
  """`[n, 128]` with equal lanes to `[n, width]`."""
  return jnp.concatenate([column] * (width // LANES), axis=1)


def lane_sums(tile):
  """Adds the columns of a tile that share a lane: `[n, width] -> [n, 128]`."""
  return functools.reduce(
    operator.add,
    (tile[:, c : c + LANES] for c in range(0, tile.shape[1], LANES)),
  )


def logits(params, s, bias):
  """Base-2 logits of products s, and d(capped score)/d(score) or None."""
  if params.soft_cap is None:
    value, slope = s * (params.scale * LOG2E), None
  else:
    ratio = jnp.tanh(s * (params.scale / params.soft_cap))
    value, slope = ratio * (params.soft_cap * LOG2E), 1 - ratio * ratio
  return value if bias is None else value + bias, slope


def each_tile(plan, refs, at, step, visit):
  """Calls `visit(tile)` for the tiles of a step of a walk.

  Column tiles are written out, because lanes are sliced statically; rows of
  more than one tile are a loop, which keeps the program short.
  """
  rows, columns = plan.tile_rows, plan.tile_columns(step.width)
  for c in range(0, step.width, columns):
    part = pl.ds(c, columns)
    tile = functools.partial(Tile, plan, refs, at, step, columns=part)
    if plan.resident == rows:
      visit(tile(rows=pl.ds(0, rows)))
    else:
      lax.fori_loop(
        0,
        plan.resident // rows,
        lambda a, _, tile=tile: visit(
          tile(rows=pl.ds(pl.multiple_of(a * rows, rows), rows))
        ),
        None,
      )


class Tile:
  """A tile of scores: its place in the buffers, and which pairs it shows.

  Mask functions that say `heads == 1` are evaluated once for a pack of heads.

  Attributes:
    rows, columns: slices of the resident block and of the stream buffer.
    buffer: number of the stream buffer.
  """

  def __init__(self, plan, refs, at, step, rows, columns):
    self._plan, self._refs, self._at = plan, refs, at
    self._entry, self._block = step.entry, step.block
    self.buffer, self.rows, self.columns = step.buffer, rows, columns
    fn = plan.mask_fn
    self._per_head = fn is not None and getattr(fn, "heads", 0) != 1
    self._masks = {}

  def parts(self):
    """Pieces of the columns that lie in one block: slices, block number."""
    size = min(self.columns.size, self._plan.streamed)
    for start in range(0, self.columns.size, size):
      part = (self.columns.start + start) // self._plan.streamed
      yield slice(start, start + size), self._block(part)

  def hide(self, value, head):
    """`value` with -inf where query head `head` of the pack must not look."""
    if self._entry is None:
      return value
    key = head if self._per_head else 0
    if key not in self._masks:
      self._masks[key] = self._mask(head)
    mask = self._masks[key]
    return value if mask is None else jnp.where(mask, value, -jnp.inf)

  def _mask(self, head):
    rows, columns = self.rows, self.columns
    plan, refs, at = self._plan, self._refs, self._at
    block, tag = self._entry
    shape = (rows.size, columns.size)
    position = lambda start, axis: (
      start + lax.broadcasted_iota(jnp.int32, shape, axis)
    )
    pair = (
      position(at.block * plan.resident + rows.start, 0),
      position(block * plan.streamed + columns.start, 1),
    )
    segments = (None, None)
    if plan.has_segments:
      segments = (
        spread(refs["resident_ids"][rows], shape[1]),
        jnp.broadcast_to(refs["streamed_ids"][self.buffer, :, columns], shape),
      )
    stored = None
    if plan.has_mask:
      stored = refs["mask"][self.buffer, rows, columns]
      stored = stored.astype(jnp.int32) != 0
    if plan.keys_resident:
      pair, segments = pair[::-1], segments[::-1]
    h = at.pack * plan.pack + head
    return numerics.element_mask(
      plan,
      h,
      *pair,
      tag=tag,
      stored=stored,
      q_segments=segments[0],
      k_segments=segments[1],
    )


def columns_of(ref, lines_ref):
  """Writes lines `[pack, n]` as columns into `ref` `[pack, n, 128]`."""
  for head in range(ref.shape[0]):
    ref[head] = column(lines_ref[head : head + 1])


def total(sums):
  """`[n, 128]` of partial sums to `[n, 128]` with every lane their sum."""
  return jnp.broadcast_to(jnp.sum(sums, axis=1, keepdims=True), sums.shape)
