"""Operands of a call in the form of the TPU kernels, with their blocks."""

import jax
from jax import numpy as jnp

from pallas_kernels.walks import tpu_call, tpu_stream
from pallas_kernels.walks import tpu_tiles as tiles


class Arrays:
  """Heads first, padded to lanes; bias and lse in units of log 2."""

  def __init__(self, plan, operands):
    self.plan, self._operands, self.layout = plan, operands, operands.layout

  @property
  def q(self):
    return tpu_call.heads_first(self._operands.q, self.plan.pack, self.plan.d)

  @property
  def k(self):
    return tpu_call.heads_first(self._operands.k, 1, self.plan.d)

  @property
  def v(self):
    return tpu_call.heads_first(self._operands.v, 1, self.plan.dv)

  @property
  def bias(self):
    return self._lines(self._operands.bias * tiles.LOG2E, self.plan.block_k)

  def d_out(self, d_out):
    """Cotangent of the output, `[B, S, H, Dv]`, heads first."""
    return tpu_call.heads_first(d_out, self.plan.pack, self.plan.dv)

  def query_lines(self, x):
    """`[B, H, S]` numbers per query by blocks."""
    return self._lines(x, self.plan.block_q)

  def _lines(self, x, block):
    return tpu_call.lines(x, self.plan.pack, block)

  def blocked_rows(self, array):
    """Resident rows of the pack (queries) or the group (keys)."""
    plan = self.plan
    head = lambda at: at.group if plan.keys_resident else at.pack
    return tpu_call.Blocked(
      array,
      (None, None, array.shape[2], plan.resident, array.shape[-1]),
      lambda at: (at.batch, head(at), 0, at.block, 0),
    )

  def blocked_lines(self, array):
    """Resident numbers per token of each head of the pack."""
    plan = self.plan
    return tpu_call.Blocked(
      array,
      (None, None, None, plan.pack, plan.resident),
      lambda at: (at.batch, at.pack, at.block, 0, 0),
    )

  def _ids(self):
    """Segment ids `[1 or B, 1, blocks, 1, block]` of queries and keys."""
    cut = lambda x, block: x.reshape(x.shape[0], 1, -1, 1, block)
    return (
      cut(self.layout.q_segments, self.plan.block_q),
      cut(self.layout.k_segments, self.plan.block_k),
    )

  def resident_ids(self):
    """Segment ids of the resident side, if there are any."""
    if not self.plan.has_segments:
      return {}
    ids = self._ids()[self.plan.keys_resident]
    return {
      "resident_lines": tpu_call.Blocked(
        ids,
        (None, None, None, 1, self.plan.resident),
        lambda at: (at.lead, 0, at.block, 0, 0),
      )
    }

  def id_scratch(self):
    """Where `read_ids` puts the ids of the resident side."""
    if not self.plan.has_segments:
      return {}
    return {"resident_ids": ((self.plan.resident, tiles.LANES), jnp.int32)}

  def _streamed(self, array, kind, **where):
    return tpu_call.Streamed(array, tpu_stream.Source(kind, **where))

  def _streamed_masks(self):
    """Streamed arrays that only partial blocks need."""
    found = {}
    if self.plan.has_segments:
      ids = self._ids()[not self.plan.keys_resident]
      found["streamed_ids"] = self._streamed(
        ids, "line", lead="lead", partial=True
      )
    if self.plan.has_mask:
      mask = self.layout.partial_mask
      if self.plan.keys_resident:
        mask = jnp.swapaxes(mask, -1, -2)
      found["mask"] = self._streamed(
        mask.astype(jnp.int8), "mask", lead="lead", partial=True
      )
    return found

  def streamed_keys(self):
    """Keys, values, bias and masks along the lists of query blocks."""
    found = {"k": self._streamed(self.k, "rows", head="group")}
    if self.plan.dv:
      found["v"] = self._streamed(self.v, "rows", head="group")
    if self.plan.has_bias:
      found["bias"] = self._streamed(self.bias, "line", head="pack")
    return found | self._streamed_masks()

  def streamed_line(self, x):
    """Numbers `[B, H, S]` of each streamed token, along the lists."""
    return self._streamed(
      self._lines(x, self.plan.streamed), "line", head="pack"
    )

  def streamed_queries(self, d_out=None, **lines):
    """Queries and what belongs to them along the lists of key blocks."""
    found = {"q": self._streamed(self.q, "rows", head="pack")}
    if d_out is not None:
      found["d_out"] = self._streamed(self.d_out(d_out), "rows", head="pack")
    found |= {name: self.streamed_line(x) for name, x in lines.items()}
    return found | self._streamed_masks()


def read_ids(refs):
  """Turns the segment ids of the resident block into a column."""
  if "resident_lines" in refs:
    refs["resident_ids"][...] = tiles.column(refs["resident_lines"][...])


def shape_like(array, dtype=None):
  """`jax.ShapeDtypeStruct` of an array."""
  return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)
