"""What the GPU kernels do to one tile of scores, in registers.

A tile is `[64, n]` float32, spread over the 128 threads of a warpgroup as the
matrix unit has it (`Layout.WGMMA`), so that scores, probabilities and the left
factor of the next product never leave the registers. Exponentials are taken to
base 2, which is what the hardware computes: logits and log-sum-exps inside the
kernels are in units of log 2.
"""

import inspect
import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import gpu_plan, numerics

LOG2E = math.log2(math.e)
LN2 = math.log(2)
ROWS = gpu_plan.ROWS
TILE = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = TILE.reduce(1), TILE.reduce(0)


def full(shape, value):
  """A float32 tile, or a number for each row, in its layout."""
  layout = TILE if len(shape) == 2 else BY_ROW
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def line(ref, layout):
  """A number for each row (`BY_ROW`) or column (`BY_COLUMN`)."""
  return plgpu.layout_cast(ref[...], layout)


# JAX 0.11 dropped the index from `plgpu.load`.
_ALL = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def load_rows(ref):
  """A tile from rows in shared memory."""
  return plgpu.load(ref, *_ALL, layout=TILE)


def load_plain(ref):
  """A tile from global memory, or from shared memory that is not swizzled.

  Every thread reads its own elements.
  """
  return plgpu.load(ref, *_ALL, layout=TILE, optimized=False)


def global_line(ref, layout):
  """A number for each row or column, from global memory."""
  return plgpu.load(ref, *_ALL, layout=layout, optimized=False)


def spread(line, columns, axis):
  """Repeats numbers of rows (axis 0) or columns (axis 1) over a tile."""
  return lax.broadcast_in_dim(line, (ROWS, columns), (axis,))


def turned(ref):
  """The transpose of a matrix in shared memory, which costs nothing."""
  return ref.transpose((1, 0))


def product(a, b, issued=None):
  """`a @ b` of references, `[64, n]`; calls `issued()` once it is under way."""

  def multiply(acc):
    plgpu.wgmma(acc, a, b)
    if issued is not None:
      issued()
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1])))


def two_products(first, second, use, overlap):
  """Two products of references, `[64, n]` each.

  Args:
    first: two references.
    second: returns two more, once the first product is issued.
    use: gets the first product.
    overlap: whether the second is under way meanwhile. If not, it is begun
      afterwards, so that `use` has its registers too.

  Returns:
    What `use` returned, and the second product.
  """
  if not overlap:
    return use(product(*first)), product(*second())

  def multiply(acc, other):
    plgpu.wgmma(acc, *first)
    plgpu.wgmma(other, *second())
    found = plgpu.wgmma_accumulator_load(acc, wait_n=1)
    return use(found), other[...]

  acc = plgpu.ACC((first[0].shape[0], first[1].shape[1]))
  return pl.run_scoped(multiply, acc, acc)


def accumulate(sums, factors, staged=None):
  """Adds `a @ b` to each sum, with `a` in registers and b a reference.

  With `staged`, a reference of a's shape, `a` goes through shared memory, and
  the sum is taken outside of the matrix unit: what Pallas's interpreter can do.
  """
  if staged is not None:
    found = []
    for acc, (a, b) in zip(sums, factors, strict=True):
      staged[...] = a
      plgpu.commit_smem()
      found.append(acc + product(staged, b))
    return tuple(found)

  if not sums:
    return ()

  def multiply(refs):
    for ref, (a, b) in zip(refs, factors, strict=True):
      plgpu.wgmma(ref, a, b)

  return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, sums)))


def product_and_sum(
  scores, total, weighted, use, like, overlap, issued, staged=None
):
  """A product that is used while another is still being added to a sum.

  Args:
    scores: two references.
    total: the sum, `[64, w]`.
    weighted: its summand: a factor in registers, and a reference.
    use: `(a @ b of scores) -> pytree of arrays`. What it is to have computed
      before the sum is waited for, it stores: the assembler moves the rest.
    like: arrays of the same shapes, dtypes and layouts.
    overlap: whether the sum is under way meanwhile. If not, it is done before.
    issued: is called once both products are under way.
    staged: as in `accumulate`; nothing overlaps then.

  Returns:
    What `use` returned, and the new sum.
  """
  if staged is not None or not overlap:
    (total,) = accumulate((total,), (weighted,), staged)
    return use(product(*scores, issued=issued)), total

  like, tree = jax.tree.flatten(like)

  def multiply(refs):
    acc, fresh, found = refs
    plgpu.wgmma(fresh, *scores)
    plgpu.wgmma(acc, *weighted)
    issued()
    made = use(plgpu.wgmma_accumulator_load(fresh, wait_n=1))
    made = lax.optimization_barrier(jax.tree.leaves(made))
    for ref, value in zip(found, made, strict=True):
      ref[...] = value

  empty = full((ROWS, scores[1].shape[1]), 0)
  init = (plgpu.ACC.init(total), plgpu.ACC.init(empty), like)
  total, _, found = pl.run_state(multiply)(init)
  # Left factors of the next products are made of these after the products that
  # read the present ones. Otherwise the assembler puts all in a row.
  found = lax.optimization_barrier(found)
  return jax.tree.unflatten(tree, found), total


class Logits:
  """Logits of a tile to base 2, as `factor * value`.

  `bias` is in units of log 2: numbers of rows or columns (`bias_axis`), or a
  whole tile.

  Attributes:
    value: what the mask hides and the maximum is taken of.
    factor: positive number, folded into the argument of the exponential.
    slope: d(capped score)/d(score), or None without a soft cap.
  """

  def __init__(self, params, s, bias, bias_axis=1):
    self.factor, self.slope = 1.0, None
    if params.soft_cap is None:
      factor = params.scale * LOG2E
      if bias is None and factor > 0:
        self.value, self.factor = s, factor
        return
      value = s * factor
    else:
      ratio = jnp.tanh(s * (params.scale / params.soft_cap))
      value = ratio * (params.soft_cap * LOG2E)
      self.slope = 1 - ratio * ratio
    if bias is not None:
      whole = bias.ndim == 2
      value = value + (bias if whole else spread(bias, s.shape[1], bias_axis))
    self.value = value

  def hide(self, mask):
    if mask is not None:
      self.value = jnp.where(mask, self.value, -jnp.inf)

  def peak(self):
    """Maximum of each row."""
    peak = jnp.max(self.value, axis=1)
    return peak if self.factor == 1.0 else peak * self.factor

  def exp2(self, shift):
    """`2 ** (logits - shift)` with a shift for each row (or column: axis)."""
    value = self.value
    if self.factor != 1.0:
      value = value * self.factor
    return jnp.exp2(value - shift)


def element_mask(cell, step, ids):
  """Which pairs of a tile are shown, or None if all are.

  Args:
    cell: `gpu_call.Cell`.
    step: `gpu_stream.Step`.
    ids: segment ids of the rows and of the columns, or None.
  """
  if step.entry is None:
    return None
  plan, at = cell.plan, cell.at
  row, entry = step.entry
  block, first = row.partial(entry), step.part * plan.tile
  size = (ROWS, plan.tile)

  def tokens(start, axis):
    return start + plgpu.broadcasted_iota(jnp.int32, size, axis, layout=TILE)

  # Positions are computed in the step: kept throughout the loop, with all that
  # a mask makes of them, they take registers that sums need.
  start, _ = lax.optimization_barrier((cell.start, step.slot))
  pair = (tokens(start, 0), tokens(block * plan.streamed + first, 1))
  segments = (None, None)
  if ids is not None:
    segments = tuple(spread(x, plan.tile, axis) for axis, x in enumerate(ids))
  stored = None
  if plan.has_mask:
    where = (at.block, entry)
    if plan.keys_resident:
      where = (block, row.slot(entry))
    rows = pl.ds(cell.start - at.block * plan.resident, ROWS)
    here = (at.lead, at.list_head, *where, rows, pl.ds(first, plan.tile))
    stored = load_plain(cell.refs["mask"].at[here]).astype(jnp.int32) != 0
  if plan.keys_resident:
    pair, segments = pair[::-1], segments[::-1]
  return numerics.element_mask(
    plan,
    cell.head,
    *pair,
    tag=row.tag(entry),
    stored=stored,
    q_segments=segments[0],
    k_segments=segments[1],
  )
