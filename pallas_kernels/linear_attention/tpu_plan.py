"""Static decisions of the TPU kernels of linear attention, and their blocks.

The grid is (example and key head, cell, query head of the group). A cell is a
run of tiles that is copied at once, because a tile alone is too little work for
a step of the grid; it is walked tile by tile, with the state in VMEM. Query
heads come last, so that keys and values are copied once for a whole group.

Arrays have their heads side by side in the lanes, `[B, tokens, H * D]`: the
caller's order, where D is a multiple of 128. The last cell may be longer than
the array; its tiles beyond the end are not visited.
"""

import dataclasses
from typing import NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.walks import canonical
from pallas_kernels.walks.tpu_plan import (
  LANES,
  VMEM_LIMIT,
  lane_padded,
)

# Tokens of a cell, at most, unless one tile alone is longer: enough to hide
# the overhead of a step, and to make the states kept for backward few.
CELL_TOKENS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Static numbers of the kernels of one call.

  Attributes:
    batch, heads, groups: examples, query heads and key heads.
    length: tokens, without padding.
    tile: tokens of a tile, a multiple of 128.
    d, dv: padded head sizes.
    item: bytes of an element of q, k and v.
  """

  batch: int
  heads: int
  groups: int
  length: int
  tile: int
  d: int
  dv: int
  item: int

  @property
  def group(self):
    """Query heads that share a key head."""
    return self.heads // self.groups

  @property
  def tiles(self):
    return -(-self.length // self.tile)

  @property
  def together(self):
    """Tiles of a cell: as many as fit."""
    most = max(1, min(CELL_TOKENS // self.tile, self.tiles))
    while most > 1 and self.vmem(most) > VMEM_LIMIT:
      most -= 1
    return most

  @property
  def size(self):
    """Tokens of a cell."""
    return self.together * self.tile

  @property
  def cells(self):
    return -(-self.tiles // self.together)

  @property
  def grid(self):
    return (self.batch * self.groups, self.cells, self.group)

  def vmem(self, together):
    """Bytes of VMEM that the backward kernel, the larger one, needs."""
    state, rows = self.d * self.dv * 4, together * self.tile
    # q, k, v, d_out and three gradients, twice (pipelined); two float32 sums.
    tokens = rows * (4 * self.d + 3 * self.dv) * self.item * 2
    tokens += rows * (self.d + self.dv) * 4
    # States of a group before and after, one kept and one for every tile.
    states = state * (4 * self.group + 2 + together)
    # Scores and rows on their way, and the powers of the decay.
    tile = self.tile * (8 * self.tile + 6 * (self.d + self.dv) + 4 * LANES) * 4
    return tokens + states + tile + 4 * state

  def cost(self, within, across, tensors):
    """`pl.CostEstimate` of a kernel.

    Args:
      within: head sizes that products of a tile with itself run over, added.
      across: products with a state.
      tensors: arrays and shapes that are read or written once.
    """
    rows = self.batch * self.heads * self.tiles * self.tile
    return pl.CostEstimate(
      flops=2 * rows * (self.tile * within + across * self.d * self.dv),
      transcendentals=self.batch
      * self.heads
      * self.cells
      * self.tile
      * (self.tile + 2 * LANES),
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in tensors),
    )


def make(operands, params):
  """Returns the `Plan` of a call (see `operands`)."""
  batch, length, heads, d = operands.q.shape
  return Plan(
    batch=batch,
    heads=heads,
    groups=operands.k.shape[2],
    length=length,
    # Tiles longer than the sequence would hold nothing but padding.
    tile=min(lane_padded(params.block), lane_padded(length)),
    d=lane_padded(d),
    dv=lane_padded(operands.v.shape[-1]),
    item=operands.q.dtype.itemsize,
  )


def side_by_side(plan, x):
  """`[B, n, heads, width]` to `[B, tokens, heads * padded width]`."""
  x = canonical.padded(x, 1, plan.tiles * plan.tile)
  x = canonical.padded(x, 3, lane_padded(x.shape[3]))
  return x.reshape(x.shape[:2] + (-1,))


def apart(plan, x, heads, width):
  """The inverse of `side_by_side`."""
  x = x.reshape(x.shape[:2] + (heads, -1))
  return x[:, : plan.length, :, :width]


def padded_state(plan, x):
  """`[B, H, D, Dv]` with head sizes padded."""
  return canonical.padded(canonical.padded(x, 2, plan.d), 3, plan.dv)


class Specs(NamedTuple):
  """Block specs by what an array holds.

  Attributes:
    decay: a number a head, `[B, G, 1, group]`, in scalar memory.
    q, out: tokens of a query head, of D and of Dv.
    k, v: tokens of a key head, of D and of Dv.
    states: states of a group, `[B, H, D, Dv]`; stay from cell to cell.
    kept: the state of one head at each cell, `[B, H, cells, D, Dv]`.
    sums: lanes for each head, `[B, G, group, 128]`; stay from cell to cell.
  """

  decay: pl.BlockSpec
  q: pl.BlockSpec
  out: pl.BlockSpec
  k: pl.BlockSpec
  v: pl.BlockSpec
  states: pl.BlockSpec
  kept: pl.BlockSpec
  sums: pl.BlockSpec


def specs(plan, reverse=False):
  """The `Specs` of a walk, from the first cell or from the last."""

  def spec(block, index, **kwargs):
    def index_map(n, cell, head):
      return index(
        lax.div(n, plan.groups),
        lax.rem(n, plan.groups),
        cell_of(plan, cell, reverse),
        head,
      )

    return pl.BlockSpec(block, index_map, **kwargs)

  group = plan.group
  of_query = lambda b, g, c, h: (b, c, g * group + h)
  of_key = lambda b, g, c, h: (b, c, g)
  of_group = lambda b, g, c, h: (b, g, 0, 0)
  tokens = lambda width, index: spec((None, plan.size, width), index)
  return Specs(
    spec((None, None, 1, group), of_group, memory_space=pltpu.SMEM),
    tokens(plan.d, of_query),
    tokens(plan.dv, of_query),
    tokens(plan.d, of_key),
    tokens(plan.dv, of_key),
    spec((None, group, plan.d, plan.dv), of_group),
    spec(
      (None, None, None, plan.d, plan.dv),
      lambda b, g, c, h: (b, g * group + h, c, 0, 0),
    ),
    spec((None, None, group, LANES), of_group),
  )


def cell_of(plan, n, reverse):
  """The cell that the grid's step n is at."""
  return plan.cells - 1 - n if reverse else n


def by_group(plan, log_decay):
  """`[B, H]` as `Specs.decay` wants it."""
  return log_decay.astype(jnp.float32).reshape(
    plan.batch, plan.groups, 1, plan.group
  )


def compiler_params():
  """Examples and key heads are independent, cells and query heads in order."""
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary", "arbitrary"),
    vmem_limit_bytes=VMEM_LIMIT,
  )
