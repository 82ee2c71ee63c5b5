"""Forward kernel for GPU: a block of queries against its key blocks.

As in FlashAttention-3 (arXiv 2407.08608, sections 3.1 and 3.2) the two compute
warpgroups take turns at the matrix unit. Each starts the scores of its next
tile together with the product of the last probabilities and values, so that
exponentials of both run beside products of both. Probabilities stay in
registers.
"""

import functools

import jax
from jax import lax
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
    scratch["turns"] = plgpu.Barrier(num_barriers=2)
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
    self._barriers = cell.refs.get("turns")
    self._own = cell.warpgroup

  def begin(self):
    """Waits for a turn."""
    if self._barriers is not None:
      plgpu.barrier_wait(self._barriers.at[self._own])

  def end(self):
    """Gives it to the other warpgroup."""
    if self._barriers is not None:
      plgpu.barrier_arrive(self._barriers.at[1 - self._own])


def _compute(cell):
  """One warpgroup's queries."""
  refs, batch = cell.refs, cell.at.batch
  arrived = cell.own("arrived")
  plgpu.copy_gmem_to_smem(
    refs["q"].at[batch, cell.here, cell.head], cell.own("q_rows"), arrived
  )
  row = cell.row()
  plgpu.barrier_wait(arrived)
  turns = _Turns(cell)
  pl.when(cell.warpgroup == 1)(turns.end)
  running = lax.cond(
    row.full_count + row.partial_count > 0,
    lambda: _over_keys(cell, turns, row),
    lambda: gpu_softmax.start(cell.plan),
  )
  out = cell.result
  line = cell.own("lse_line")
  gpu_softmax.put(running, out, line)
  plgpu.copy_smem_to_gmem(out, refs["out"].at[batch, cell.here, cell.head])
  plgpu.copy_smem_to_gmem(line, refs["lse"].at[batch, cell.head, cell.here])
  plgpu.wait_smem_to_gmem(0)


def _over_keys(cell, turns, row):
  """The `Running` of all listed keys: values are added a tile late."""
  first = functools.partial(_first_keys, cell, turns)
  visit = functools.partial(_visit_keys, cell, turns)
  slot, (running, p) = gpu_stream.walk_on(cell.plan, row, first, visit)
  _, values = cell.rings
  values.wait(slot)
  factors = ((p, values.buffers["v"].at[slot]),)
  (acc,) = tiles.accumulate((running.acc,), factors, cell.own("staged"))
  return running._replace(acc=acc)


def _scores(cell, step):
  """Factors of a tile's scores, of which the keys have arrived."""
  keys, _ = cell.rings
  keys.wait(step.slot)
  return cell.own("q_rows"), tiles.turned(keys.buffers["k"].at[step.slot])


def _weigh(cell, step, running, s):
  """The `gpu_softmax.Weighed` of a tile of scores; keys are done with."""
  keys, _ = cell.rings
  logits = gpu_operands.logits(cell, step, s)
  gpu_stream.release(step.slot, keys)
  return gpu_softmax.weigh(cell.plan, running.peak, running.mass, logits)


def _first_keys(cell, turns, step):
  """Takes the first tile of keys in."""
  none = gpu_softmax.start(cell.plan)
  factors = _scores(cell, step)
  turns.begin()
  s = tiles.product(*factors, turns.end)
  found = _weigh(cell, step, none, s)
  p = found.p.astype(factors[0].dtype)
  return none._replace(peak=found.peak, mass=found.mass), p


def _visit_keys(cell, turns, step, state):
  """Takes a tile of keys in while the values of the one before are added."""
  plan, (running, p) = cell.plan, state
  _, values = cell.rings
  last = lax.rem(step.slot + plan.depth - 1, jnp.int32(plan.depth))
  scores = _scores(cell, step)
  empty = tiles.full((_ROWS, plan.tile), 0)

  def use(s):
    found = _weigh(cell, step, running, s)
    # For its place alone: all exponentials come before what is stored.
    cell.own("lse_line")[...] = found.mass
    return found

  values.wait(last)
  turns.begin()
  found, acc = tiles.product_and_sum(
    scores,
    running.acc,
    (p, values.buffers["v"].at[last]),
    use,
    gpu_softmax.Weighed(running.peak, running.mass, running.mass, empty),
    step.entry is None,  # Masks take the registers of the second product.
    turns.end,
    cell.own("staged"),
  )
  gpu_stream.release(last, values)
  acc = gpu_softmax.shrunk(plan, acc, found.shrink)
  p = found.p.astype(p.dtype)
  return gpu_softmax.Running(acc, found.peak, found.mass), p
