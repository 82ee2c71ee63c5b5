"""Streams the tiles of listed blocks through shared memory, ahead of their use.

Arrays stay where the caller has them, `[B, S, heads, D]`: the copy engine takes
a tile of one head out of them. Two rings of `plan.depth` buffers hold what was
loaded ahead, because of each listed block one half is needed earlier (keys
before values, queries before their cotangents). One warpgroup only starts
copies (`stream`), the others compute (`walk`); both go through the same lists,
and barriers of the rings keep them together.
"""

import functools
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import lists

# The matrix unit wants rows of 128 bytes, swizzled.
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def rows_buffer(shape, dtype):
  """Shared memory for factors of matrix products."""
  return plgpu.SMEM(shape, dtype, transforms=_TRANSFORMS)


class Place(NamedTuple):
  """What a thread block works on.

  Attributes:
    batch, lead: example, and where its lists stand (0 if lists are shared).
    head: the first query head.
    group: its key head.
    list_head: its layout head.
    start: the first resident token.
    block: the resident block.
  """

  batch: Any
  lead: Any
  head: Any
  group: Any
  list_head: Any
  start: Any
  block: Any

  def at_head(self, plan, head):
    """The same place for another query head of the group."""
    per_list = plan.heads // plan.list_heads
    return self._replace(
      head=head, list_head=lax.div(head, jnp.int32(per_list))
    )


def place(plan, cell):
  """The `Place` of a thread block.

  Heads that share keys follow each other, so that what one loads is still in
  the second-level cache for the next. The last queries, whose lists are the
  longest where attention is causal, begin.
  """

  def split(n, size):
    size = jnp.int32(size)
    return lax.div(n, size), lax.rem(n, size)

  member = jnp.int32(0)
  if not plan.keys_resident:
    cell, member = split(cell, plan.group_size // plan.heads_per_cell)
  cell, tile = split(cell, plan.row_tiles)
  if not plan.keys_resident:
    tile = plan.row_tiles - 1 - tile
  batch, group = split(cell, plan.groups)
  start = tile * plan.rows
  at = Place(
    batch,
    jnp.int32(0) if plan.shared_lists else batch,
    None,
    group,
    None,
    start,
    lax.div(start, jnp.int32(plan.resident)),
  )
  head = group * plan.group_size + member * plan.heads_per_cell
  return at.at_head(plan, head)


class Row:
  """Reads the lists of one resident block from global memory."""

  def __init__(self, plan, ref, at):
    self._read = lambda n: ref[at.lead, at.list_head, at.block, n]
    self._starts = lists.starts(plan)
    self._has_tag, self._has_partial = plan.has_tag, bool(plan.capacity[1])
    self.full_count = self._read(0)

  @property
  def partial_count(self):
    """Read when it is asked for, so that no register holds it before."""
    return self._read(1) if self._has_partial else jnp.int32(0)

  def block(self, n):
    """Block number of entry n: the full ones, then the partial ones."""
    past = self._starts.partial - self.full_count
    return self._read(
      n + jnp.where(n < self.full_count, self._starts.full, past)
    )

  def partial(self, t):
    return self._read(self._starts.partial + t)

  def tag(self, t):
    return self._read(self._starts.tag + t) if self._has_tag else None

  def slot(self, t):
    """Place of transposed partial entry t in its query block's list."""
    return self._read(self._starts.slot + t)


class Source(NamedTuple):
  """An array that goes through a ring.

  Attributes:
    array: `[B, S, heads, D]` rows, `[B, H, S]` numbers per token, or `[1 or B,
      S]` segment ids.
    head: "head" or "group", which head of it.
    resident: whether it is taken at the resident tokens. What is small and
      differs from head to head, or matters in few blocks, comes along with
      every step: that costs less than more barriers.
    lines_per_head: how many lines of numbers belong to a head.
  """

  array: Any
  head: str = "head"
  resident: bool = False
  lines_per_head: int = 1

  def buffer(self, plan):
    tokens = plan.rows if self.resident else plan.tile
    if self.array.ndim == 4:
      shape = (plan.depth, tokens, self.array.shape[-1])
      return rows_buffer(shape, self.array.dtype)
    return plgpu.SMEM((plan.depth, self.lines(plan), tokens), self.array.dtype)

  def lines(self, plan):
    """Number of copies in one step: numbers come for each head."""
    if self.array.ndim != 3:
      return 1
    return plan.heads_per_cell * self.lines_per_head

  def copies(self, plan, at, start, ref, buffer):
    """Pairs of what is copied where, for streamed tokens from `start` on."""
    tokens = pl.ds(start, plan.tile)
    if self.resident:
      tokens = pl.ds(at.start, plan.rows)
    head = getattr(at, self.head)
    if self.array.ndim == 4:
      return [(ref.at[at.batch, tokens, head], buffer)]
    if self.array.ndim == 2:
      return [(ref.at[at.lead, tokens], buffer.at[0])]
    return [
      (ref.at[at.batch, head * self.lines_per_head + n, tokens], buffer.at[n])
      for n in range(self.lines(plan))
    ]


class Ring:
  """Buffers that are filled and freed together.

  Args:
    plan, sources, refs, scratch: what it streams, and its `scratch`.
    watched: for simulation: also reads the factors of matrix products, which
      the interpreter's race detector does not look at otherwise.
  """

  def __init__(self, plan, sources, refs, scratch, watched=False):
    self._plan, self._sources, self._refs = plan, sources, refs
    self._watched = watched
    self.buffers, self._filled, self._free = scratch

  @staticmethod
  def scratch(plan, sources):
    """Buffers, and barriers: filled by copies, freed by warpgroups."""
    arrivals = sum(source.lines(plan) for source in sources.values())
    barrier = functools.partial(plgpu.Barrier, num_barriers=plan.depth)
    return (
      {name: source.buffer(plan) for name, source in sources.items()},
      barrier(num_arrivals=arrivals),
      barrier(num_arrivals=plan.warpgroups),
    )

  def fill(self, at, start, position):
    """Starts the copies of a step, once its buffers are free."""
    slot = lax.rem(position, jnp.int32(self._plan.depth))

    @pl.when(position >= self._plan.depth)
    def _():
      plgpu.barrier_wait(self._free.at[slot])

    for name, source in self._sources.items():
      buffer = self.buffers[name].at[slot]
      for src, dst in source.copies(
        self._plan, at, start, self._refs[name], buffer
      ):
        plgpu.copy_gmem_to_smem(src, dst, self._filled.at[slot])

  def wait(self, slot):
    plgpu.barrier_wait(self._filled.at[slot])
    for buffer in self.buffers.values() if self._watched else ():
      _ = buffer[slot]

  @property
  def read_by_threads(self):
    """Whether something in it is not only a factor of matrix products."""
    return self._watched or any(
      x.array.ndim < 4 for x in self._sources.values()
    )

  def free(self, slot):
    plgpu.barrier_arrive(self._free.at[slot])


def release(slot, *rings, touched=False):
  """Lets the buffers of rings be filled again.

  What threads have read, or `touched` otherwise, needs a fence before the copy
  engine may write there.
  """
  if touched or any(ring.read_by_threads for ring in rings):
    plgpu.commit_smem()
  for ring in rings:
    ring.free(slot)


def stream(plan, rings, at, row, position):
  """Copies the tiles of a row's lists in order; returns the next position."""
  parts = jnp.int32(plan.parts)

  def step(n, position):
    block = row.block(lax.div(n, parts))
    start = block * plan.streamed + lax.rem(n, parts) * plan.tile
    for ring in rings:
      ring.fill(at, start, position)
    return position + 1

  steps = (row.full_count + row.partial_count) * plan.parts
  return lax.fori_loop(jnp.int32(0), steps, step, position)


def stream_cell(plan, refs, rings):
  """Copies what one thread block needs whose lists are those of one head."""
  at = place(plan, lax.axis_index("cell"))
  stream(plan, rings, at, Row(plan, refs["lists"], at), jnp.int32(0))


def each_head(plan, at, turn, state):
  """Folds `turn(place, state)` over the query heads that share the keys."""

  def one(n, state):
    return turn(at.at_head(plan, at.group * plan.group_size + n), state)

  size = jnp.int32(plan.group_size)
  return lax.fori_loop(jnp.int32(0), size, one, state)


def stream_heads(plan, refs, rings):
  """Copies the queries of all heads that share the keys, head by head."""
  at = place(plan, lax.axis_index("cell"))

  def turn(at, position):
    return stream(plan, rings, at, Row(plan, refs["lists"], at), position)

  each_head(plan, at, turn, jnp.int32(0))


class Step(NamedTuple):
  """One tile of the streamed side.

  Attributes:
    slot: buffer of the rings.
    entry: None in full blocks; in partial ones their row and entry in it.
    part: which tile of the block.
    block: returns the number of the block. It is read when it is asked for.
  """

  slot: Any
  entry: Any
  part: Any
  block: Any


def walk(plan, row, position, visit, carry):
  """Visits the tiles that `stream` copies.

  Args:
    plan: the `Plan`.
    row: `Row`.
    position: int32, steps taken before.
    visit: `(step, carry) -> carry`.
    carry: a pytree of arrays.

  Returns:
    The next position, and the carry.
  """
  zero = jnp.int32(0)
  state = (position, carry)
  state = _loop(plan, row, _full, zero, visit, state)
  if not plan.capacity[1]:
    return state
  return _loop(plan, row, _partial, zero, visit, state)


def walk_on(plan, row, first, visit):
  """As `walk`, of a row that is not empty, where the first step differs.

  Args:
    plan, row, visit: as in `walk`.
    first: `(step) -> carry`, takes the first step.

  Returns:
    The slot of the last step, and the carry.
  """
  zero = jnp.int32(0)
  begin = lambda kind: first(kind.step(plan, row, zero, zero))
  if not plan.capacity[1]:
    some, carry = jnp.bool(True), begin(_full)
  else:
    some = row.full_count > 0
    carry = lax.cond(some, lambda: begin(_full), lambda: begin(_partial))
  begun = some.astype(jnp.int32)
  state = (jnp.int32(1), carry)
  state = _loop(plan, row, _full, begun, visit, state)
  if plan.capacity[1]:
    state = _loop(plan, row, _partial, 1 - begun, visit, state)
  position, carry = state
  return slot_of(plan, position - 1), carry


def slot_of(plan, position):
  """Buffer of a step.

  Known to change from step to step, also in a ring of one stage: addresses and
  descriptors of its buffers would be kept in registers throughout.
  """
  depth = jnp.int32(plan.depth)
  return lax.optimization_barrier((position, lax.rem(position, depth)))[1]


class _Kind(NamedTuple):
  """Full or partial blocks of a list.

  Attributes:
    count: `(row) -> how many`.
    block: `(row, t) -> number of block t`.
    entry: `(row, t) -> Step.entry`.
  """

  count: Any
  block: Any
  entry: Any

  def step(self, plan, row, n, position):
    parts = jnp.int32(plan.parts)
    t = lax.div(n, parts)
    block = lambda: self.block(row, t)
    return Step(
      slot_of(plan, position), self.entry(row, t), lax.rem(n, parts), block
    )


_full = _Kind(
  lambda row: row.full_count, lambda row, t: row.block(t), lambda *_: None
)
_partial = _Kind(
  lambda row: row.partial_count,
  lambda row, t: row.partial(t),
  lambda row, t: (row, t),
)


def _loop(plan, row, kind, start, visit, state):
  """Visits the tiles of one kind of blocks from number `start` on."""

  def body(n, state):
    position, carry = state
    return position + 1, visit(kind.step(plan, row, n, position), carry)

  return lax.fori_loop(start, kind.count(row) * plan.parts, body, state)
