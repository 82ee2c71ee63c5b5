"""Streams the blocks of a cell's lists through VMEM, ahead of their use.

The lists stay in HBM; a grid cell sees its own row of them and the next cell's
in scalar memory, so neither sequence length nor the number of heads is limited
by it. Blocks are copied by hand rather than by `pltpu.emit_pipeline` for two
reasons: several short blocks land side by side and are multiplied as one, and
the first blocks of the next cell are already on their way while the last one
of this cell is computed.

A walk has three loops over one count of steps: wide steps (`together` full
blocks), the full blocks left over, the partial ones. Invariant: when a cell
begins, its first `min(steps, depth - 1)` steps have been started, into the
buffers `position, position + 1, ...` modulo `depth`.
"""

import dataclasses
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.walks import lists


class Place(NamedTuple):
  """What a grid cell works on: int32 scalars.

  Attributes:
    batch: example.
    lead: example of the lists, 0 where all share them.
    pack: pack of query heads.
    group: key head.
    heads: layout head.
    block: resident block.
  """

  batch: Any
  lead: Any
  pack: Any
  group: Any
  heads: Any
  block: Any


class Step(NamedTuple):
  """What one step of a walk finds in the buffers.

  Attributes:
    buffer: number of the buffer.
    width: columns in use, static.
    entry: `(block, tag)` of a partial block, or None: all is visible.
    block: function from u to the number of the block in part u of the buffer.
  """

  buffer: Any
  width: int
  entry: Any
  block: Any


def place(plan, b, x, n):
  """The `Place` of grid cell (b, x, n)."""
  div, rem = lax.div, lax.rem
  turn, block = (
    (0, n) if plan.turns == 1 else (rem(n, plan.turns), div(n, plan.turns))
  )
  pack = x * plan.turns + turn
  part = lambda size: pack if size == 1 else div(pack, size)
  return Place(
    b,
    0 if plan.shared_lists else b,
    pack,
    part(plan.packs_per_group),
    part(plan.packs_per_list),
    block,
  )


class Row:
  """Reads a row that `lists.rows` made."""

  def __init__(self, plan, ref):
    self._read = lambda at: ref[0, at]
    self._starts = lists.starts(plan)
    self._has_tag = plan.has_tag
    self._full_last, self._last = (size - 1 for size in plan.capacity)
    self.full_count, self.partial_count = self._read(0), self._read(1)
    self.wide = lax.div(self.full_count, plan.together)
    self.single = self.full_count - self.wide * plan.together
    self.steps = self.wide + self.single + self.partial_count

  def full(self, t):
    """Block number of full entry t, or any if there is none."""
    return self._read(self._starts.full + jnp.clip(t, 0, self._full_last))

  def partial(self, t):
    """Block number of partial entry t, or any if there is none."""
    return self._read(self._starts.partial + jnp.clip(t, 0, self._last))

  def tag(self, t):
    return self._read(self._starts.tag + t) if self._has_tag else None

  def slot(self, t):
    """Place of transposed partial entry t in its query block's list."""
    return self._read(self._starts.slot + t)


@dataclasses.dataclass(frozen=True)
class Source:
  """One streamed array.

  Attributes:
    kind: "rows", an array `[B, heads, pack, tokens, D]`; "line", `[B, heads,
      blocks, pack, block]`; "mask", `[B, L, q blocks, capacity, rows,
      columns]`.
    head: field of `Place` that says which head, or None for the first.
    lead: field of `Place` that says which example.
    partial: whether only partial blocks need it.
  """

  kind: str
  head: str = None
  lead: str = "batch"
  partial: bool = False


class Stream:
  """The copies of one kernel."""

  def __init__(self, plan, sources, refs, buffers, semaphores, position):
    self._plan = plan
    self._sources = tuple(zip(sources, refs, buffers, strict=True))
    self._semaphores = semaphores
    self._position = position

  def _copies(self, at, block, mask_at, buffer, u, partial):
    """Copies of one block into part u of a buffer."""
    size = self._plan.streamed
    part = pl.ds(u * size, size)
    for source, ref, scratch in self._sources:
      if source.partial != partial:
        continue
      lead = getattr(at, source.lead)
      head = 0 if source.head is None else getattr(at, source.head)
      if source.kind == "rows":
        start = pl.multiple_of(block * size, size)
        src = ref.at[lead, head, :, pl.ds(start, size), :]
        dst = scratch.at[buffer, :, part, :]
      elif source.kind == "line":
        src = ref.at[lead, head, block]
        dst = scratch.at[buffer, :, part]
      else:
        src, dst = ref.at[lead, at.heads, *mask_at], scratch.at[buffer]
      yield pltpu.make_async_copy(src, dst, self._semaphores.at[buffer])

  def _wide(self, at, row, t, buffer, act):
    together = self._plan.together
    for u in range(together):
      block = row.full(t * together + u)
      for copy in self._copies(at, block, None, buffer, u, False):
        act(copy)

  def _partial(self, at, row, t, buffer, act):
    """Copies what only partial blocks need."""
    mask_at = None
    if self._plan.has_mask:
      mask_at = (
        (row.partial(t), row.slot(t))
        if self._plan.keys_resident
        else (at.block, t)
      )
    for copy in self._copies(at, row.partial(t), mask_at, buffer, 0, True):
      act(copy)

  def _start(self, at, row, t, buffer):
    """Starts the copies of step t."""

    def one_block():
      left = t - row.wide
      is_partial = left >= row.single
      block = jnp.where(
        is_partial,
        row.partial(left - row.single),
        row.full(row.wide * self._plan.together + left),
      )
      for copy in self._copies(at, block, None, buffer, 0, False):
        copy.start()
      if any(source.partial for source, _, _ in self._sources):
        pl.when(is_partial)(
          lambda: self._partial(
            at, row, left - row.single, buffer, lambda copy: copy.start()
          )
        )

    pl.when(t < row.wide)(
      lambda: self._wide(at, row, t, buffer, lambda copy: copy.start())
    )
    pl.when(t >= row.wide)(one_block)

  def _buffer(self, position, t):
    return lax.rem(position + t, self._plan.depth)

  def _start_first(self, at, row, position):
    """Starts the first steps of a cell."""

    def start(t, _):
      self._start(at, row, t, self._buffer(position, t))

    lax.fori_loop(0, jnp.minimum(row.steps, self._plan.depth - 1), start, None)

  def walk(self, at, row, following, following_row, n, visit):
    """Visits all blocks of a cell's lists.

    Args:
      at, row: `Place` and `Row` of the cell.
      following, following_row: those of the next cell of the last grid axis.
      n: number of the cell on that axis.
      visit: called with a `Step`.
    """
    plan = self._plan

    @pl.when(n == 0)
    def _():
      self._position[0] = 0
      self._start_first(at, row, 0)

    position = self._position[0]

    def start_following():
      self._start_first(following, following_row, position + row.steps)

    more = n + 1 < plan.grid[2]

    def look_ahead(t):
      ahead = t + plan.depth - 1
      pl.when(ahead < row.steps)(
        lambda: self._start(at, row, ahead, self._buffer(position, ahead))
      )
      pl.when((t == row.steps - 1) & more)(start_following)

    wait = lambda copy: copy.wait()

    def wide(t, _):
      look_ahead(t)
      buffer = self._buffer(position, t)
      self._wide(at, row, t, buffer, wait)
      visit(
        Step(
          buffer, plan.width, None, lambda u: row.full(t * plan.together + u)
        )
      )

    def single(t, _):
      step = row.wide + t
      look_ahead(step)
      buffer = self._buffer(position, step)
      block = row.full(row.wide * plan.together + t)
      for copy in self._copies(at, block, None, buffer, 0, False):
        copy.wait()
      visit(Step(buffer, plan.streamed, None, lambda _: block))

    def partial(t, _):
      step = row.wide + row.single + t
      look_ahead(step)
      buffer = self._buffer(position, step)
      for copy in self._copies(at, row.partial(t), None, buffer, 0, False):
        copy.wait()
      self._partial(at, row, t, buffer, wait)
      block = row.partial(t)
      visit(Step(buffer, plan.streamed, (block, row.tag(t)), lambda _: block))

    lax.fori_loop(0, row.wide, wide, None)
    if plan.together > 1:
      lax.fori_loop(0, row.single, single, None)
    lax.fori_loop(0, row.partial_count, partial, None)
    pl.when((row.steps == 0) & more)(start_following)
    self._position[0] = self._buffer(position, row.steps)
