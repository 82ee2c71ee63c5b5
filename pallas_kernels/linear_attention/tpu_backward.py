"""Backward kernel of linear attention for TPU: one walk from the last cell.

A cell first recomputes the states before its tiles from the one that forward
kept, then goes through its tiles from the last with the gradient of the state.
Both states at hand, the gradient of log_decay is that of the recurrence from
tile to tile: distances within a tile times the products that the other
gradients need anyway, with nothing that grows with the length to cancel.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import operands as forms
from pallas_kernels.linear_attention import tpu_plan, tpu_tiles
from pallas_kernels.walks.tpu_tiles import lane_sums


def backward(operands, params, kept, d_out, d_last, interpret=False):
  """Runs the kernel; see `operands`.

  Args:
    operands, params: the call.
    kept: states before each cell, from `tpu_forward.forward`.
    d_out: gradient of out, `[B, n, H, Dv]`.
    d_last: gradient of the last state, `[B, H, D, Dv]`.
    interpret: False or `pltpu.InterpretParams`.

  Returns:
    `Operands` of gradients.
  """
  plan = tpu_plan.make(operands, params)
  specs = tpu_plan.specs(plan, reverse=True)
  q, k, v = (tpu_plan.side_by_side(plan, x) for x in operands[:3])
  d_out = tpu_plan.side_by_side(plan, d_out)
  d_last = tpu_plan.padded_state(plan, d_last)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  sums = (plan.batch, plan.groups, plan.group, tpu_plan.LANES)
  outputs = [*map(like, (q, k, v, d_last))]
  outputs.append(jax.ShapeDtypeStruct(sums, jnp.float32))
  d_q, d_k, d_v, d_state, d_decay = pl.pallas_call(
    functools.partial(_kernel, plan, params),
    out_shape=outputs,
    grid=plan.grid,
    in_specs=[
      specs.decay, specs.q, specs.k, specs.v, specs.out, specs.kept,
      specs.states,
    ],
    out_specs=[specs.q, specs.k, specs.v, specs.states, specs.sums],
    scratch_shapes=_scratch(plan),
    compiler_params=tpu_plan.compiler_params(),
    cost_estimate=plan.cost(
      3 * plan.d + 2 * plan.dv, 5, [q, k, v, d_out, kept, d_last, *outputs]
    ),
    interpret=interpret,
    name="linear_attention_backward",
  )(
    tpu_plan.by_group(plan, operands.log_decay), q, k, v, d_out, kept, d_last
  )  # fmt: skip
  d, dv = operands.state.shape[2:]
  return forms.Operands(
    tpu_plan.apart(plan, d_q, plan.heads, d),
    tpu_plan.apart(plan, d_k, plan.groups, d),
    tpu_plan.apart(plan, d_v, plan.groups, dv),
    d_decay.sum(axis=3).reshape(plan.batch, plan.heads),
    d_state[..., :d, :dv],
  )


def _scratch(plan):
  """States before the tiles, gradients of keys and values, and decays."""
  shapes = (
    (plan.together, plan.d, plan.dv),
    (plan.size, plan.d),
    (plan.size, plan.dv),
  )
  found = [pltpu.VMEM(shape, jnp.float32) for shape in shapes]
  return found + tpu_tiles.scratch(plan)


def _kernel(
  plan, params, decay, q, k, v, g, kept, d_last,
  d_q, d_k, d_v, d_state, d_decay, states, sum_k, sum_v, *powers,
):  # fmt: skip
  """One cell of one query head; `d_state` holds those of the group."""
  step, head = pl.program_id(1), pl.program_id(2)
  cell = tpu_plan.cell_of(plan, step, reverse=True)
  decays = tpu_tiles.Decays(plan, decay[0, head], params.scale, powers)
  tiles = tpu_tiles.Tiles(plan, params, cell, q.dtype)

  @pl.when(step == 0)
  def _():
    d_state[head] = d_last[head]
    d_decay[pl.ds(head, 1)] = jnp.zeros((1, tpu_plan.LANES), jnp.float32)

  @pl.when(head == 0)
  def _():
    sum_k[...] = jnp.zeros_like(sum_k)
    sum_v[...] = jnp.zeros_like(sum_v)

  _recompute(tiles, decays, k, v, kept, states)

  def visit(n, _):
    n = tiles.count - 1 - n
    number, rows = tiles.at(n)
    held = decays.enter(number)
    found = _tile(
      plan, tiles, decays, held, states[n], d_state[head],
      *(ref[rows] for ref in (q, k, v, g)),
    )  # fmt: skip
    d_q[rows] = found[0].astype(d_q.dtype)
    sum_k[rows] += found[1]
    sum_v[rows] += found[2]
    d_state[head] = found[3]
    d_decay[pl.ds(head, 1)] += found[4]

  lax.fori_loop(0, tiles.count, visit, None)

  @pl.when(head == plan.group - 1)
  def _():
    d_k[...] = sum_k[...].astype(d_k.dtype)
    d_v[...] = sum_v[...].astype(d_v.dtype)


def _recompute(tiles, decays, k, v, kept, states):
  """Writes the states before the tiles of a cell."""
  states[0] = kept[...]

  # The state after the last tile is where the next cell begins.
  def visit(n, _):
    number, rows = tiles.at(n)
    held = decays.enter(number)
    states[n + 1] = tiles.after(decays, held, states[n], k[rows], v[rows])

  lax.fori_loop(0, tiles.count - 1, visit, None)


def _tile(plan, tiles, decays, held, state, d_state, q, k, v, g):
  """One tile.

  Args:
    plan, tiles, decays: of the cell.
    held: number of tokens of the tile.
    state: before the tile, `[D, Dv]`.
    d_state: gradient of the state after it.
    q, k, v, g: tokens of the tile; g is the gradient of their outputs.

  Returns:
    Gradients of q, k, v, of the state before, and of log_decay as 128 numbers
    to be added.
  """
  product, scaled = tiles.product, tiles.scaled
  weights, since = decays.weights[...], decays.since[...]
  until = decays.until[...]
  s = product(q, k, 1, 1)
  d_s = product(g, v, 1, 1) * weights
  across_q = scaled(product(g, state, 1, 1), since)
  across_k = scaled(product(v, d_state, 1, 1), until)
  across_v = scaled(product(k, d_state, 1, 0), until)
  d_q = product(d_s, k, 1, 0) + across_q
  d_k = product(d_s, q, 0, 0) + across_k
  d_v = product(s * weights, g, 0, 0) + across_v
  whole = decays.whole(held, state.shape[1])
  d_decay = (
    _total(s * d_s * tpu_tiles.lags(s.shape))
    + _total(scaled(q * across_q, tpu_tiles.places(plan) + 1))
    + _total(scaled(k * across_k, tpu_tiles.following(plan, held)))
    + held * _total(whole * state * d_state)
  )
  before = whole * d_state + product(scaled(q, since), g, 0, 0)
  return d_q, d_k, d_v, before, d_decay


def _total(x):
  """Sums over rows, and over columns that share a lane: `[1, 128]`."""
  return jnp.sum(lane_sums(x), axis=0, keepdims=True)
