"""Forward kernel for TPU: a block of queries against its key blocks.

Online softmax as in FlashAttention (arXiv 2205.14135). Row sums are kept per
lane and reduced once at the end of a cell rather than in every step.
"""

import functools

import jax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.walks import contract, tpu_call, tpu_operands, tpu_plan
from pallas_kernels.walks import tpu_tiles as tiles


def forward(operands, params, interpret=False):
  """See `contract`."""
  plan = tpu_plan.make(operands)
  arrays = tpu_operands.Arrays(plan, operands)
  rows = (plan.pack, plan.block_q)
  q = arrays.q
  outputs = {
    "out": arrays.blocked_rows(
      jax.ShapeDtypeStruct(q.shape[:-1] + (plan.dv,), q.dtype)
    ),
    "lse": arrays.blocked_lines(
      jax.ShapeDtypeStruct(
        (plan.batch, plan.packs, plan.q_blocks) + rows, jnp.float32
      )
    ),
  }
  scratch = {
    "peak": (rows + (tiles.LANES,), jnp.float32),
    "mass": (rows + (tiles.LANES,), jnp.float32),
    "sum": (rows + (plan.dv,), jnp.float32),
    **arrays.id_scratch(),
  }
  resident = {"q": arrays.blocked_rows(q), **arrays.resident_ids()}
  out, lse = tpu_call.run(
    plan,
    "block_sparse_attention_forward",
    functools.partial(_body, plan, params),
    arrays.layout,
    resident,
    arrays.streamed_keys(),
    outputs,
    scratch,
    tpu_call.cost(plan, 2, tpu_call.nbytes(q, outputs["out"].array)),
    interpret,
  )
  out = tpu_call.heads_last(out, operands.v.shape[-1])
  return out, tpu_call.unlines(lse)


def _body(plan, params, refs, at, n, walk):
  """One block of queries."""
  del n
  refs["peak"][...] = jnp.full_like(refs["peak"], contract.MAX_INIT)
  refs["mass"][...] = jnp.zeros_like(refs["mass"])
  refs["sum"][...] = jnp.zeros_like(refs["sum"])
  tpu_operands.read_ids(refs)

  def visit(tile):
    for head in range(plan.pack):
      _online_softmax(plan, params, refs, tile, head)

  walk(lambda step: tiles.each_tile(plan, refs, at, step, visit))
  for head in range(plan.pack):
    mass = tiles.total(refs["mass"][head])
    shown = mass > 0
    some = jnp.where(shown, mass, 1)
    out = refs["sum"][head] / tiles.spread(some, plan.dv)
    refs["out"][head] = out.astype(refs["out"].dtype)
    lse = (refs["peak"][head] + jnp.log2(some)) * tiles.LN2
    lse = jnp.where(shown, lse, -jnp.inf)
    refs["lse"][head : head + 1] = tiles.line(lse)


def _online_softmax(plan, params, refs, tile, head):
  """Adds a tile of one query head."""
  buffer, rows, columns = tile.buffer, tile.rows, tile.columns
  q, k = refs["q"][head, rows], refs["k"][buffer, 0, columns]
  v = refs["v"][buffer, 0, columns]
  s = tiles.product(q, k, 1, 1, params.precision)
  bias = None
  if plan.has_bias:
    bias = refs["bias"][buffer, pl.ds(head, 1), columns]
  value, _ = tiles.logits(params, s, bias)
  value = tile.hide(value, head)
  peak = refs["peak"][head, rows]
  new_peak = jnp.maximum(peak, jnp.max(value, axis=1, keepdims=True))
  p = jnp.exp2(value - tiles.spread(new_peak, value.shape[1]))
  shrink = jnp.exp2(peak - new_peak)
  refs["peak"][head, rows] = new_peak
  refs["mass"][head, rows] = refs["mass"][
    head, rows
  ] * shrink + tiles.lane_sums(p)
  refs["sum"][head, rows] = refs["sum"][head, rows] * tiles.spread(
    shrink, plan.dv
  ) + tiles.product(p.astype(v.dtype), v, 1, 0, params.precision)
