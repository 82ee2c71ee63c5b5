"""Operands of a call in the form of the GPU kernels."""

from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import gpu_plan, gpu_stream, lists
from pallas_kernels.walks import gpu_tiles as tiles


class Arrays:
  """Heads padded to rows of 128 bytes; bias and lse in units of log 2."""

  def __init__(self, plan, operands):
    self.plan, self._operands, self.layout = plan, operands, operands.layout

  @property
  def rows(self):
    """The lists."""
    return lists.rows(self.plan, self.layout)

  @property
  def q(self):
    return _padded(self._operands.q, self.plan.d)

  @property
  def k(self):
    return _padded(self._operands.k, self.plan.d)

  @property
  def v(self):
    return _padded(self._operands.v, self.plan.dv)

  @property
  def bias(self):
    return self._operands.bias * tiles.LOG2E

  def d_out(self, d_out):
    """Cotangent of the output, `[B, S, H, Dv]`."""
    return _padded(d_out, self.plan.dv)

  def masks(self):
    """Stored element masks, which partial blocks read from global memory."""
    if not self.plan.has_mask:
      return {}
    stored = self.layout.partial_mask
    if self.plan.keys_resident:
      stored = jnp.swapaxes(stored, -1, -2)
    return {"mask": stored.astype(jnp.int8)}

  def _ids(self):
    if not self.plan.has_segments:
      return {}
    sides = (self.layout.q_segments, self.layout.k_segments)
    resident = self.plan.keys_resident
    return {
      "row_ids": gpu_stream.Source(sides[resident], resident=True),
      "column_ids": gpu_stream.Source(sides[not resident]),
    }

  def keys(self):
    """What belongs to streamed keys, without their values."""
    found = {"k": gpu_stream.Source(self.k, "group"), **self._ids()}
    if self.plan.has_bias:
      found["bias"] = gpu_stream.Source(self.bias)
    return found

  def streamed_keys(self):
    """Both rings of the kernels that stream keys."""
    return self.keys(), {"v": gpu_stream.Source(self.v, "group")}

  def queries(self, lse):
    """What belongs to streamed queries."""
    found = {
      "q": gpu_stream.Source(self.q),
      "lse": gpu_stream.Source(lse * tiles.LOG2E),
      **self._ids(),
    }
    if self.plan.has_bias:
      found["bias"] = gpu_stream.Source(self.bias, resident=True)
    return found

  def streamed_queries(self, lse, delta, d_out):
    """Both rings of the kernel that streams queries; delta may be None."""
    second = {"d_out": gpu_stream.Source(self.d_out(d_out))}
    if delta is not None:
      second["delta"] = gpu_stream.Source(delta)
    return self.queries(lse), second

  def staging(self, interpret):
    """See `staging`."""
    return staging(self.plan, self._operands.q.dtype, interpret)


def staging(plan, dtype, interpret):
  """Where left factors go that the interpreter cannot read in registers."""
  if interpret is None:
    return {}
  shape = (plan.warpgroups, gpu_plan.ROWS, plan.tile)
  return {"staged": plgpu.SMEM(shape, dtype)}


def query_rows(plan, dtype, interpret):
  """Scratch for resident queries and their results, see `Cell.result`."""
  rows = (plan.warpgroups, gpu_plan.ROWS)
  found = {"q_rows": gpu_stream.rows_buffer(rows + (plan.d,), dtype)}
  if plan.dv != plan.d:
    found["out_rows"] = gpu_stream.rows_buffer(rows + (plan.dv,), dtype)
  return {**found, **staging(plan, dtype, interpret)}


def lines(cell, step):
  """Bias of the keys, and segment ids of rows and columns, or None."""
  plan, buffers = cell.plan, cell.buffers(step)
  first = 0 if plan.head_pairs else cell.warpgroup * gpu_plan.ROWS
  own = pl.ds(first, gpu_plan.ROWS)
  bias = ids = None
  if plan.has_bias and plan.keys_resident:
    bias = tiles.line(buffers["bias"].at[0, own], tiles.BY_ROW)
  elif plan.has_bias:
    line = buffers["bias"].at[cell.warpgroup if plan.head_pairs else 0]
    bias = tiles.line(line, tiles.BY_COLUMN)
  if plan.has_segments and step.entry is not None:
    ids = (
      tiles.line(buffers["row_ids"].at[0, own], tiles.BY_ROW),
      tiles.line(buffers["column_ids"].at[0], tiles.BY_COLUMN),
    )
  return bias, ids


def logits(cell, step, s):
  """`tiles.Logits` of scores, bias and mask applied."""
  bias, ids = lines(cell, step)
  axis = 0 if cell.plan.keys_resident else 1
  found = tiles.Logits(cell.params, s, bias, axis)
  found.hide(tiles.element_mask(cell, step, ids))
  return found


def _padded(x, size):
  """Pads the last axis with zeros to `size`."""
  if x.shape[-1] == size:
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
