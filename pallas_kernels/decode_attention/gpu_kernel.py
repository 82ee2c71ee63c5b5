"""The GPU kernel of decode attention: one key head and split a thread block.

What bounds it is the cache that it reads: `2 * (D + Dv)` bytes an entry and key
head. The rows of the matrix unit are mostly padding where few heads share a
key head, and yet its products take a third of the time of the copies (head
size 128), so that nothing is gained by computing in plain registers.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import (
  contract,
  gpu_call,
  gpu_operands,
  gpu_plan,
  gpu_softmax,
  gpu_stream,
)
from pallas_kernels.walks import gpu_tiles as tiles

_ROWS = gpu_plan.ROWS


def run(call, options, interpret):
  """Runs the kernel.

  Args:
    call: `gpu_operands.Call`.
    options: `operands.Options`.
    interpret: None or `plgpu.InterpretGPUParams`.

  Returns:
    Output `[B, splits * rows, G, Dv]` and log-sum-exp `[B, G, splits * rows]`.
  """
  plan, packing = call.plan, call.packing
  dtype = call.q.dtype
  scratch = {
    **gpu_operands.query_rows(plan, dtype, interpret),
    "lse_line": plgpu.SMEM((1, _ROWS), jnp.float32),
    "arrived": plgpu.Barrier(num_barriers=1),
  }
  batch, _, groups, _ = call.q.shape
  length = packing.splits * packing.rows
  return gpu_call.run(
    plan,
    contract.Params(options.scale, options.soft_cap),
    "decode_attention",
    functools.partial(gpu_stream.stream_cell, plan),
    functools.partial(_compute, packing),
    {"lists": call.lists, "q": call.q, "lengths": call.lengths},
    (call.streamed(),),
    {
      "out": jax.ShapeDtypeStruct((batch, length, groups, plan.dv), dtype),
      "lse": jax.ShapeDtypeStruct((batch, groups, length), jnp.float32),
    },
    scratch,
    interpret,
  )


def _compute(packing, cell):
  """All rows of a key head against one split's blocks."""
  plan, refs, at = cell.plan, cell.refs, cell.at
  arrived = cell.own("arrived")
  plgpu.copy_gmem_to_smem(
    refs["q"].at[at.batch, :, at.group], cell.own("q_rows"), arrived
  )
  length = refs["lengths"][at.batch]
  plgpu.barrier_wait(arrived)
  visit = functools.partial(_visit, packing, cell, length)
  _, running = gpu_stream.walk(
    plan, cell.row(), jnp.int32(0), visit, gpu_softmax.start(plan)
  )
  out = cell.result
  line = cell.own("lse_line")
  gpu_softmax.put(running, out, line)
  used = pl.ds(0, packing.rows)
  here = pl.ds(at.block * packing.rows, packing.rows)
  plgpu.copy_smem_to_gmem(
    out.at[used], refs["out"].at[at.batch, here, at.group]
  )
  plgpu.copy_smem_to_gmem(
    line.at[used], refs["lse"].at[at.batch, at.group, here]
  )
  plgpu.wait_smem_to_gmem(0)


def _visit(packing, cell, length, step, running):
  """Adds one tile of the cache."""
  plan, buffers = cell.plan, cell.buffers(step)
  (entries,) = cell.rings
  entries.wait(step.slot)
  first = step.block() * plan.streamed + step.part * plan.tile
  touched = _mark_hidden(packing, plan, buffers, first, length)
  q = cell.own("q_rows")
  s = tiles.product(q, tiles.turned(buffers["k"]))
  bias = _bias(packing, plan, buffers)
  logits = tiles.Logits(
    cell.params, s, None if bias is None else bias * tiles.LOG2E
  )
  logits.hide(_visible(packing, plan, buffers, first, length))
  if bias is not None:
    logits.hide(bias != -jnp.inf)
  running, p = gpu_softmax.add(plan, running, logits, q.dtype)
  factors = ((p, buffers["v"]),)
  (acc,) = tiles.accumulate((running.acc,), factors, cell.own("staged"))
  gpu_stream.release(step.slot, entries, touched=touched)
  return running._replace(acc=acc)


def _mark_hidden(packing, plan, buffers, first, length):
  """Keeps what is hidden and not finite from the products.

  Entries that are not finite get values of zero and keys of NaN: so are their
  logits, which masks hide by selection (see `walks.hidden`). That matters only
  where a row does not see an entry: at the end of the cache, or by a bias.

  Returns:
    Whether the buffers may be written.
  """
  if not plan.has_bias and packing.gathered:
    if not packing.hides_inside:
      return False  # What no row sees was zeroed when it was gathered.
    _mark(plan, buffers)
    return True
  back = packing.tokens - 1 if packing.causal else 0
  cut = plan.has_bias | (first + plan.tile > length - back)
  pl.when(cut)(functools.partial(_mark, plan, buffers))
  return True


def _mark(plan, buffers):
  """Replaces entries that are not finite."""
  for start in range(0, plan.tile, _ROWS):
    rows = pl.ds(start, _ROWS)
    parts = {
      # Few columns at a time, because the sums stay in their registers.
      name: [
        buffers[name].at[rows, pl.ds(column, _ROWS)]
        for column in range(0, width, _ROWS)
      ]
      for name, width in (("v", plan.dv), ("k", plan.d))
    }
    # A sum of zeros, or NaN.
    nan = tiles.full((_ROWS,), 0)
    for ref in parts["v"]:
      nan += jnp.sum(tiles.load_rows(ref).astype(jnp.float32) * 0, axis=1)
    for name, other in (("v", 0), ("k", jnp.nan)):
      for ref in parts[name]:
        x = tiles.load_rows(ref).astype(jnp.float32)
        good = tiles.spread(nan, ref.shape[1], 0) == 0
        ref[...] = jnp.where(good, x, other).astype(ref.dtype)
  plgpu.commit_smem()


def _places(plan, axis):
  """Numbers of rows (axis 0) or columns (1) of a tile, `[64, tile]`."""
  size = (_ROWS, plan.tile)
  return plgpu.broadcasted_iota(jnp.int32, size, axis, layout=tiles.TILE)


def _visible(packing, plan, buffers, first, length):
  """Which entries of a tile each row sees."""
  if packing.gathered:
    line = tiles.line(buffers["positions"].at[0], tiles.BY_COLUMN)
    at = tiles.spread(line, plan.tile, 1)
  else:
    at = first + _places(plan, 1)
  if not packing.hides_inside:
    return at < length
  token = lax.div(_places(plan, 0), jnp.int32(packing.share))
  # The last of the new tokens sees everything; so may rows of padding.
  back = jnp.maximum(packing.tokens - 1 - token, 0)
  return at < length - back


def _bias(packing, plan, buffers):
  """Bias of each row's head, `[64, tile]`, or None."""
  if not plan.has_bias:
    return None
  member = lax.rem(_places(plan, 0), jnp.int32(packing.share))

  def one(n, found):
    line = tiles.line(buffers["bias"].at[n], tiles.BY_COLUMN)
    return jnp.where(member == n, tiles.spread(line, plan.tile, 1), found)

  # A loop, or the compiler loads the lines of all heads before it uses one.
  none, share = jnp.int32(0), jnp.int32(packing.share)
  return lax.fori_loop(none, share, one, tiles.full((_ROWS, plan.tile), 0))
