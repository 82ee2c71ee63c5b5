"""Decode attention for TPU, by Pallas: listed or filled blocks only.

A grid cell is one example, key head and split. Queries that share the key head
stay in VMEM; the blocks that count are copied one after the other, several
ahead, and multiplied as they arrive. The cell's list is in scalar memory. The
caches are read heads first, `[B, G, n, D]`: with `heads_first=False` they are
transposed before, which inside one jit XLA can turn into the layout of the
cache, and between two costs a copy.
"""

import functools

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import tpu as attention
from pallas_kernels.decode_attention import operands as forms
from pallas_kernels.decode_attention.merge import merge
from pallas_kernels.walks import canonical, contract, tpu_plan
from pallas_kernels.walks import tpu_tiles as tiles

_DTYPES = ("bfloat16", "float32")
# Bytes on their way at a time: what memory delivers during its own latency.
_AHEAD = 2 * 2**20
# Entries of a step where whole caches are read.
_STEP = 1024


def supports(operands, options):
  """The reason against these operands, or None; see `contract`."""
  q, k, v = operands.q, operands.k, operands.v
  n = forms.length(operands, options)
  if operands.tokens is not None:
    return "it reads blocks, not single tokens"
  if str(q.dtype) not in _DTYPES:
    return f"q, k, v are {q.dtype}, the kernel takes {' or '.join(_DTYPES)}"
  for name, size in (("k", k.shape[-1]), ("v", v.shape[-1])):
    if size % tpu_plan.LANES:
      return f"{name} has head size {size}, the kernel needs a multiple of 128"
  size = options.block_size if operands.blocks is not None else tpu_plan.LANES
  if size % tpu_plan.LANES or n % size:
    return (
      f"block_size is {size} and the cache has {n} entries; the kernel needs "
      "a block_size that is a multiple of 128 and divides the cache"
    )
  return None


def attend(operands, options, interpret=False):
  """Returns output `[B, t, H, Dv]` and log-sum-exp `[B, H, t]`, float32."""
  batch, t, heads, _ = operands.q.shape
  k, v = (forms.heads_first(x, options) for x in (operands.k, operands.v))
  groups, m = k.shape[1], heads // k.shape[1]
  rows = -(-t * m // 16) * 16
  size = options.block_size
  if operands.blocks is None:
    size = tpu_plan.largest_tile(k.shape[2], _STEP)
  out, lse = _run(
    options, size, _rows(operands, groups, size),
    _ends(operands, options, m, rows), _by_group(operands.q, groups, rows),
    k, v, _bias(operands, groups, t, rows, size), interpret,
  )  # fmt: skip
  out, lse = merge(out[..., : t * m, :], lse[..., : t * m, 0], axis=2)
  out = out.reshape(batch, groups, t, m, -1)
  out = jnp.swapaxes(out, 1, 2).reshape(batch, t, heads, -1)
  lse = lse.reshape(batch, groups, t, m)
  return out, jnp.swapaxes(lse, 2, 3).reshape(batch, heads, t)


def _by_group(x, groups, rows):
  """`[B, t, H, D]` to `[B, G, t * m, D]`, padded to `rows`."""
  batch, t, heads, width = x.shape
  x = x.reshape(batch, t, groups, heads // groups, width)
  x = jnp.swapaxes(x, 1, 2).reshape(batch, groups, -1, width)
  return canonical.padded(x, 2, rows)


def _rows(operands, groups, size):
  """Number of steps, then the listed blocks: int32 `[B, G, 1, 1 + m]`."""
  if operands.blocks is None:
    steps = -(-operands.lengths // size)
    shape = (steps.shape[0], groups, 1, 1)
    return jnp.broadcast_to(steps.reshape(-1, 1, 1, 1), shape)
  m = operands.blocks.shape[-1]
  steps = jnp.clip(operands.counts, 0, m)[..., None]
  return jnp.concatenate([steps, operands.blocks], axis=-1)[:, :, None]


def _ends(operands, options, m, rows):
  """Exclusive end of what each row sees, the same in every lane."""
  end = forms.last_visible(operands, options)
  end = canonical.padded(jnp.repeat(end, m, axis=1), 1, rows)
  return jnp.broadcast_to(end[..., None], end.shape + (tiles.LANES,))


def _bias(operands, groups, t, rows, size):
  """Bias of each row by blocks, `[B, G, blocks, rows, size]`, or None."""
  if operands.bias is None:
    return None
  batch, heads, n = operands.bias.shape
  x = operands.bias.reshape(batch, groups, 1, heads // groups, n)
  x = jnp.broadcast_to(x, x.shape[:2] + (t,) + x.shape[3:])
  x = canonical.padded(x.reshape(batch, groups, -1, n), 2, rows)
  x = x.reshape(batch, groups, rows, n // size, size) * tiles.LOG2E
  return jnp.swapaxes(x, 2, 3)


def _run(options, size, lists, ends, q, k, v, bias, interpret):
  """Partial outputs `[B, G, splits, rows, Dv]`, and lse in every lane."""
  batch, groups, rows, _ = q.shape
  streamed = [k, v] + ([] if bias is None else [bias])
  step = size * (k.shape[-1] + v.shape[-1]) * k.dtype.itemsize
  depth = max(2, min(16, _AHEAD // step))
  whole = lambda *tail: pl.BlockSpec(
    (None, None) + tail, lambda b, g, s: (b, g) + (0,) * len(tail)
  )
  part = lambda width: pl.BlockSpec(
    (None, None, None, rows, width), lambda b, g, s: (b, g, s, 0, 0)
  )
  partial = lambda width: jax.ShapeDtypeStruct(
    (batch, groups, options.splits, rows, width), jnp.float32
  )
  buffers = [
    pltpu.VMEM((depth, rows if x is bias else size, x.shape[-1]), x.dtype)
    for x in streamed
  ]
  lanes = pltpu.VMEM((rows, tiles.LANES), jnp.float32)
  call = pl.pallas_call(
    functools.partial(_kernel, options, size, depth, bias is not None),
    out_shape=[partial(v.shape[-1]), partial(tiles.LANES)],
    grid=(batch, groups, options.splits),
    in_specs=[
      pl.BlockSpec(
        (None, None, 1, lists.shape[-1]), lambda b, g, s: (b, g, 0, 0),
        memory_space=pltpu.SMEM,
      ),
      pl.BlockSpec((None, rows, tiles.LANES), lambda b, g, s: (b, 0, 0)),
      whole(rows, q.shape[-1]),
    ]
    + [pl.BlockSpec(memory_space=pl.ANY)] * len(streamed),
    out_specs=[part(v.shape[-1]), part(tiles.LANES)],
    scratch_shapes=[
      *buffers, lanes, lanes, pltpu.VMEM((rows, v.shape[-1]), jnp.float32),
      pltpu.SemaphoreType.DMA((depth,)),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel"),
      vmem_limit_bytes=tpu_plan.VMEM_LIMIT,
      disable_bounds_checks=True,
    ),
    cost_estimate=_cost(lists, q, k, v, size),
    interpret=interpret,
    name="decode_attention",
  )  # fmt: skip
  return call(lists, ends, q, *streamed)


def _cost(lists, q, k, v, size):
  """An upper bound: full lists."""
  listed = (lists.shape[-1] - 1) * size or k.shape[2]
  pairs = q.shape[0] * q.shape[1] * q.shape[2] * listed
  width = k.shape[-1] + v.shape[-1]
  entries = q.shape[0] * q.shape[1] * listed
  return pl.CostEstimate(
    flops=2 * pairs * width,
    transcendentals=pairs,
    bytes_accessed=entries * width * k.dtype.itemsize,
  )


def _kernel(options, size, depth, has_bias, lists, ends, q, *refs):
  """One split of one key head of one example."""
  streamed, (out, lse) = refs[: 2 + has_bias], refs[2 + has_bias :][:2]
  buffers, rest = refs[4 + has_bias :][: 2 + has_bias], refs[6 + 2 * has_bias :]
  peak, mass, total, semaphores = rest
  b, g, split = (pl.program_id(axis) for axis in range(3))
  steps = lists[0, 0]
  share = lax.div(steps + options.splits - 1, options.splits)
  start = split * share
  stop = jnp.minimum(start + share, steps)
  peak[...] = jnp.full_like(peak, contract.MAX_INIT)
  mass[...] = jnp.zeros_like(mass)
  total[...] = jnp.zeros_like(total)

  def block_of(i):
    if lists.shape[-1] == 1:
      return i
    last = streamed[0].shape[2] // size - 1
    return jnp.clip(lists[0, 1 + i], 0, last)

  def copies(i):
    block, buffer = block_of(i), lax.rem(i, depth)
    at = pl.ds(pl.multiple_of(block * size, size), size)
    for n, (source, target) in enumerate(zip(streamed, buffers, strict=True)):
      source = source.at[b, g, block] if n == 2 else source.at[b, g, at]
      yield pltpu.make_async_copy(
        source, target.at[buffer], semaphores.at[buffer]
      )

  def begin(i):
    @pl.when(i < stop)
    def _():
      for copy in copies(i):
        copy.start()

  lax.fori_loop(start, start + depth - 1, lambda i, _: begin(i), None)

  def step(i, _):
    begin(i + depth - 1)
    for copy in copies(i):
      copy.wait()
    buffer = lax.rem(i, depth)
    bias = buffers[2][buffer] if has_bias else None
    _online_softmax(
      options, size, block_of(i), ends, q, buffers[0][buffer],
      buffers[1][buffer], bias, peak, mass, total,
    )  # fmt: skip

  lax.fori_loop(start, stop, step, None)
  whole = tiles.total(mass[...])
  # Not whole > 0: NaN stays.
  some = jnp.where(whole == 0, 1, whole)
  out[...] = total[...] / tiles.spread(some, total.shape[1])
  found = (peak[...] + jnp.log2(some)) * tiles.LN2
  lse[...] = jnp.where(whole == 0, -jnp.inf, found)


def _online_softmax(
  options, size, block, ends, q, k, v, bias, peak, mass, total
):
  """Adds one block of the cache; what is hidden may be NaN (`walks.hidden`)."""
  params = contract.Params(options.scale, options.soft_cap)
  # Reading the cache takes longer than multiplying in full precision.
  precision = lax.Precision.HIGHEST
  value, _ = tiles.logits(
    params, tiles.product(q[...], k, 1, 1, precision), bias
  )
  value, v = value + tiles.nan_of_rows(v), tiles.plain(v)
  if bias is not None:
    value = jnp.where(bias == -jnp.inf, -jnp.inf, value)
  at = block * size + lax.broadcasted_iota(jnp.int32, value.shape, 1)
  value = jnp.where(at < tiles.spread(ends[...], size), value, -jnp.inf)
  new = jnp.maximum(peak[...], jnp.max(value, axis=1, keepdims=True))
  p = jnp.exp2(value - tiles.spread(new, size))
  shrink = jnp.exp2(peak[...] - new)
  peak[...] = new
  mass[...] = mass[...] * shrink + tiles.lane_sums(p)
  total[...] = total[...] * tiles.spread(
    shrink, total.shape[1]
  ) + tiles.product(p.astype(v.dtype), v, 1, 0, precision)


_KERNEL = (attend, None, supports)
# Of the simulator's options, the implementation that has them.
interpreted = functools.partial(attention.simulated, *_KERNEL)
IMPLEMENTATIONS = (attention.compiled(*_KERNEL), interpreted())
