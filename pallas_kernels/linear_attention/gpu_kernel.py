"""The GPU kernel of linear attention: tokens against those of their cell.

A cell is a run of tokens. What came before it is in its state, which is there
already (`gpu_states`), so that all cells are computed at the same time. Within
one, a thread block keeps 128 queries and streams the keys and values of the
tiles before them; no state goes from tile to tile.

All gradients are sums of the same kind: of q with the roles of keys and values
exchanged, of k and v with the order of the tokens turned around.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import BlockLayout
from pallas_kernels.walks import (
  contract,
  gpu_call,
  gpu_operands,
  gpu_plan,
  gpu_stream,
)
from pallas_kernels.walks import gpu_tiles as tiles
from pallas_kernels.walks import lists as walked

_ROWS = gpu_plan.ROWS
BLOCK = 2 * _ROWS


@dataclasses.dataclass(frozen=True)
class Order:
  """How tokens are gone through.

  Attributes:
    length: tokens, without padding.
    cell: tokens of a cell.
    reverse: whether from the last to the first.
    shift: steps that the initial state decays before the first token: 1, or 0
      where it is the gradient of a state after the last token.
  """

  length: int
  cell: int
  reverse: bool = False
  shift: int = 1

  @property
  def cells(self):
    return -(-self.length // self.cell)

  @property
  def blocks(self):
    """Blocks of 128 tokens, the last of which may hold padding."""
    return -(-self.length // BLOCK)

  def lists(self):
    """Blocks of its cell that come before each block, and the block itself."""
    per_cell = self.cell // BLOCK
    number = np.arange(self.blocks, dtype=np.int32)
    first = number // per_cell * per_cell
    if self.reverse:
      last = np.minimum(first + per_cell, self.blocks) - 1
      count, start = last - number, number + 1
    else:
      count, start = number - first, first
    most = max(1, per_cell - 1)
    index = start[:, None] + np.arange(most, dtype=np.int32)[None]
    lead = lambda x: jnp.asarray(x)[None, None]
    return BlockLayout(
      full_count=lead(count), full_index=lead(index),
      partial_count=lead(np.ones_like(number)),
      partial_index=lead(number[:, None]), dropped=jnp.zeros((1, 1), jnp.int32),
      block_q=BLOCK, block_k=BLOCK, q_len=self.blocks * BLOCK,
      k_len=self.blocks * BLOCK,
    )  # fmt: skip


def run(order, q, k, v, states, log_decay, scale, interpret):
  """`scale * (sum over s of w ** lag (q[t] . k[s]) v[s] + q[t] . state)`.

  Args:
    order: `Order`.
    q, k, v: `[B, blocks * 128, heads, width]` with head sizes padded; heads
      are the query heads, or those that they share.
    states: `[B, H, cells, D, Dv]` before each cell, in the dtype of q.
    log_decay: float32 `[B, H]`.
    scale: static factor.
    interpret: None or `plgpu.InterpretGPUParams`.

  Returns:
    `[B, blocks * 128, H, Dv]`.
  """
  batch, heads = log_decay.shape
  shape = lambda x, heads: jax.ShapeDtypeStruct(
    (*x.shape[:2], heads, x.shape[3]), x.dtype
  )
  # Of all arrays the one with the fewest heads says who shares.
  groups = min(x.shape[2] for x in (q, k, v))
  layout = order.lists()
  plan = gpu_plan.make(
    contract.Operands(
      shape(q, heads), shape(k, groups), shape(v, groups), None, layout
    ),
    "linear",
  )
  source = lambda x: gpu_stream.Source(x, _index(x, heads))
  scratch = {
    **gpu_operands.query_rows(plan, q.dtype, interpret),
    "state": gpu_stream.rows_buffer((plan.d, plan.dv), q.dtype),
    "arrived": plgpu.Barrier(num_barriers=plan.warpgroups),
    "state_arrived": plgpu.Barrier(),
  }
  (out,) = gpu_call.run(
    plan,
    contract.Params(scale),
    "linear_attention",
    functools.partial(gpu_stream.stream_cell, plan),
    functools.partial(_compute, order, _index(q, heads)),
    {
      "lists": walked.rows(plan, layout), "q": q, "states": states,
      "decay": log_decay * math.log2(math.e),
    },
    ({"k": source(k)}, {"v": source(v)}),
    {"out": jax.ShapeDtypeStruct((*q.shape[:2], heads, plan.dv), q.dtype)},
    scratch,
    interpret,
  )  # fmt: skip
  return out


def _index(x, heads):
  """Which head of an array a thread block takes."""
  return "head" if x.shape[2] == heads else "group"


def _compute(order, index, cell):
  """One warpgroup's tokens."""
  plan, refs, at = cell.plan, cell.refs, cell.at
  arrived = cell.own("arrived")
  here = (at.batch, cell.here, getattr(at, index))
  plgpu.copy_gmem_to_smem(refs["q"].at[here], cell.own("q_rows"), arrived)

  @pl.when(cell.warpgroup == 0)
  def _():
    number = lax.div(at.start, jnp.int32(order.cell))
    state = refs["states"].at[at.batch, at.head, number]
    plgpu.copy_gmem_to_smem(state, refs["state"], refs["state_arrived"])

  decay = refs["decay"][at.batch, at.head]
  plgpu.barrier_wait(arrived)
  plgpu.barrier_wait(refs["state_arrived"])
  since = jnp.exp2(decay * _since(order, cell))
  across = tiles.product(cell.own("q_rows"), refs["state"])
  acc = across * tiles.spread(since, plan.dv, 0)
  visit = functools.partial(_visit, order, cell, decay)
  _, acc = gpu_stream.walk(plan, cell.row(), jnp.int32(0), visit, acc)
  out = cell.result
  out[...] = (acc * cell.params.scale).astype(out.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out, refs["out"].at[at.batch, cell.here, at.head])
  plgpu.wait_smem_to_gmem(0)


def _since(order, cell):
  """Steps that the state before the cell decays until each row, `[64]`."""
  row = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=tiles.BY_ROW)
  first = cell.start - lax.rem(cell.start, jnp.int32(order.cell))
  place = cell.start - first + row
  if order.reverse:
    held = jnp.minimum(order.length - first, order.cell)
    place = jnp.maximum(held - 1 - place, 0)  # Rows of padding come first.
  return (place + order.shift).astype(jnp.float32)


def _visit(order, cell, decay, step, acc):
  """Adds one tile of keys and values."""
  buffers, q = cell.buffers(step), cell.own("q_rows")
  keys, values = cell.rings
  keys.wait(step.slot)
  s = tiles.product(q, tiles.turned(buffers["k"]))
  gpu_stream.release(step.slot, keys)
  p = _decayed(order, cell, decay, step, s)
  values.wait(step.slot)
  factors = ((p.astype(q.dtype), buffers["v"]),)
  (acc,) = tiles.accumulate((acc,), factors, cell.own("staged"))
  gpu_stream.release(step.slot, values)
  return acc


def _decayed(order, cell, decay, step, s):
  """Scores times `w ** lag`; 0 where a column comes later than its row."""
  tile = cell.plan.tile
  iota = lambda size, layout: plgpu.broadcasted_iota(
    jnp.int32, (size,), 0, layout=layout
  )
  # Known in the step alone, see `tiles.element_mask`.
  start, _ = lax.optimization_barrier((cell.start, step.slot))
  first = step.block() * cell.plan.streamed + step.part * tile
  rows = start - first + iota(_ROWS, tiles.BY_ROW)
  places = (rows, iota(tile, tiles.BY_COLUMN))
  wide = lambda lines: [tiles.spread(x, tile, n) for n, x in enumerate(lines)]
  # Converted as lines: for each element that would cost an exponential more.
  ahead = -decay if order.reverse else decay
  row, column = wide([x.astype(jnp.float32) * ahead for x in places])
  p = s * jnp.exp2(row - column)
  if step.entry is None:
    return p
  row, column = wide(places)
  return jnp.where(row <= column if order.reverse else row >= column, p, 0)
