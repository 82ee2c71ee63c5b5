"""Forward kernel of linear attention for TPU."""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention import tpu_plan, tpu_tiles
from pallas_kernels.walks.tpu_tiles import nan_of_rows, plain


def forward(operands, params, keep=False, interpret=False):
  """Runs the kernel; see `operands`.

  Args:
    operands, params: the call.
    keep: whether to return what the backward pass needs.
    interpret: False or `pltpu.InterpretParams`.

  Returns:
    out `[B, n, H, Dv]` in the dtype of q, the last state `[B, H, D, Dv]`, and
    the states before each cell, `[B, H, cells, padded D, padded Dv]`, or None.
  """
  plan = tpu_plan.make(operands, params)
  specs = tpu_plan.specs(plan)
  q, k, v = (tpu_plan.side_by_side(plan, x) for x in operands[:3])
  state = tpu_plan.padded_state(plan, operands.state)
  shape = jax.ShapeDtypeStruct
  outputs = [
    shape(q.shape[:2] + (plan.heads * plan.dv,), q.dtype),
    shape(state.shape, jnp.float32),
  ]
  if keep:
    kept = state.shape[:2] + (plan.cells,) + state.shape[2:]
    outputs.append(shape(kept, jnp.float32))
  out, last, *kept = pl.pallas_call(
    functools.partial(_kernel, plan, params),
    out_shape=outputs,
    grid=plan.grid,
    in_specs=[specs.decay, specs.q, specs.k, specs.v, specs.states],
    out_specs=[specs.out, specs.states] + [specs.kept] * keep,
    scratch_shapes=tpu_tiles.scratch(plan),
    compiler_params=tpu_plan.compiler_params(),
    cost_estimate=plan.cost(plan.d + plan.dv, 2, [q, k, v, state, *outputs]),
    interpret=interpret,
    name="linear_attention_forward",
  )(tpu_plan.by_group(plan, operands.log_decay), q, k, v, state)
  d, dv = operands.state.shape[2:]
  out = tpu_plan.apart(plan, out, plan.heads, dv)
  return out, last[..., :d, :dv], kept[0] if keep else None


def _kernel(plan, params, decay, q, k, v, initial, out, last, *refs):
  """One cell of one query head; `last` holds the states of the group."""
  *kept, weights, since, until = refs
  cell, head = pl.program_id(1), pl.program_id(2)
  decays = tpu_tiles.Decays(
    plan, decay[0, head], params.scale, (weights, since, until)
  )
  tiles = tpu_tiles.Tiles(plan, params, cell, q.dtype)
  after = tpu_tiles.lags(weights.shape) >= 0

  @pl.when(cell == 0)
  def _():
    last[head] = initial[head]

  for ref in kept:
    ref[...] = last[head]

  def visit(n, _):
    number, rows = tiles.at(n)
    held, state = decays.enter(number), last[head]
    query, key, value = (ref[rows] for ref in (q, k, v))
    s = tiles.product(query, key, 1, 1) * weights[...]
    s = jnp.where(after, s + nan_of_rows(value), 0)
    across = tiles.product(query, state, 1, 0)
    within = tiles.product(s, plain(value), 1, 0)
    result = within + tiles.scaled(across, since[...])
    out[rows] = result.astype(out.dtype)
    last[head] = tiles.after(decays, held, state, key, value)

  lax.fori_loop(0, tiles.count, visit, None)
