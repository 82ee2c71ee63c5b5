"""Forward kernel for GPU: a block of queries against its key blocks.

The two compute warpgroups take turns, as in FlashAttention-3 (arXiv
2407.08608, section 3.1): one computes exponentials while the other has the
matrix unit. Probabilities stay in registers.
"""

import functools

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import (
  gpu_call,
  gpu_operands,
  gpu_plan,
  gpu_softmax,
  gpu_stream,
)
from pallas_kernels.walks import gpu_tiles as tiles

_ROWS = gpu_plan.ROWS


def forward(operands, params, interpret=None):
  """See `contract`."""
  plan = gpu_plan.make(operands, "forward")
  arrays = gpu_operands.Arrays(plan, operands)
  dtype = operands.q.dtype
  batch, length, heads, _ = operands.q.shape
  rows = (plan.warpgroups, _ROWS)
  scratch = {
    **gpu_operands.query_rows(plan, dtype, interpret),
    "lse_line": plgpu.SMEM(rows, jnp.float32),
    "arrived": plgpu.Barrier(num_barriers=plan.warpgroups),
  }
  if plan.warpgroups == 2:
    scratch["turns"] = plgpu.Barrier(num_arrivals=2)
  out, lse = gpu_call.run(
    plan,
    params,
    "block_sparse_attention_forward",
    functools.partial(gpu_stream.stream_cell, plan),
    _compute,
    {"lists": arrays.rows, "q": arrays.q, **arrays.masks()},
    arrays.streamed_keys(),
    {
      "out": jax.ShapeDtypeStruct((batch, length, heads, plan.dv), dtype),
      "lse": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    },
    scratch,
    interpret,
  )
  return out[..., : operands.v.shape[-1]], lse


class _Turns:
  """Lets two warpgroups issue matrix products by turns."""

  def __init__(self, cell):
    self._barrier = cell.refs.get("turns")

  def arrive(self):
    if self._barrier is not None:
      plgpu.barrier_arrive(self._barrier)

  def wait(self):
    if self._barrier is not None:
      plgpu.barrier_wait(self._barrier)

  def change(self):
    self.arrive()
    self.wait()


def _compute(cell):
  """One warpgroup's queries."""
  plan, refs, batch = cell.plan, cell.refs, cell.at.batch
  arrived = cell.own("arrived")
  plgpu.copy_gmem_to_smem(
    refs["q"].at[batch, cell.here, cell.head], cell.own("q_rows"), arrived
  )
  row = cell.row()
  plgpu.barrier_wait(arrived)
  turns = _Turns(cell)
  pl.when(cell.warpgroup == 1)(turns.change)
  visit = functools.partial(_visit_keys, cell, turns)
  _, running = gpu_stream.walk(
    plan, row, jnp.int32(0), visit, gpu_softmax.start(plan)
  )
  pl.when(cell.warpgroup == 0)(turns.change)
  out = cell.result
  line = cell.own("lse_line")
  gpu_softmax.put(running, out, line)
  plgpu.copy_smem_to_gmem(out, refs["out"].at[batch, cell.here, cell.head])
  plgpu.copy_smem_to_gmem(line, refs["lse"].at[batch, cell.head, cell.here])
  plgpu.wait_smem_to_gmem(0)


def _visit_keys(cell, turns, step, running):
  """Adds one tile of keys."""
  plan, buffers = cell.plan, cell.buffers(step)
  keys, values = cell.rings
  keys.wait(step.slot)
  q = cell.own("q_rows")
  s = tiles.product(q, tiles.turned(buffers["k"]), turns.change)
  logits = gpu_operands.logits(cell, step, s)
  gpu_stream.release(step.slot, keys)
  running, p = gpu_softmax.add(plan, running, logits, q.dtype)
  turns.arrive()
  values.wait(step.slot)
  turns.wait()
  factors = ((p, buffers["v"]),)
  (acc,) = tiles.accumulate((running.acc,), factors, cell.own("staged"))
  gpu_stream.release(step.slot, values)
  return running._replace(acc=acc)
