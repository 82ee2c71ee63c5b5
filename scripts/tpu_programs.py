"""Programs of the TPU kernels and of splash attention, as shapes to compile.

No arrays are made: what is in the lists of a layout does not matter to the
compiler. `scripts.tpu_table` reads the schedules of these programs, and the
tests of ahead-of-time compilation hold them to budgets.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from pallas_kernels import (
  aot,
  block_sparse_attention,
  decode_attention,
  linear_attention,
)
from pallas_kernels import layout as layouts
from pallas_kernels.aot import tpu
from pallas_kernels.attention_mass import masses
from pallas_kernels.linear_attention import operands as linear_forms


def shapes(*sizes, dtype=jnp.bfloat16):
  """The shape of an array."""
  return jax.ShapeDtypeStruct(sizes, dtype)


def lists(length, block, capacity, mask_fn=None, heads=1, by_key=None):
  """A layout of square blocks.

  Args:
    length: tokens of queries and of keys.
    block: size of a block.
    capacity: full blocks that a row of blocks may list; partial ones are two.
    mask_fn: of the partial blocks.
    heads: that have lists of their own.
    by_key: query blocks that a key block may be listed by; None: all.
  """
  rows = length // block
  by_key = by_key or rows
  ints = functools.partial(shapes, dtype=jnp.int32)
  counts = ints(1, heads, rows)
  return layouts.BlockLayout(
    counts,
    ints(1, heads, rows, capacity),
    counts,
    ints(1, heads, rows, 2),
    ints(1, heads),
    block_q=block,
    block_k=block,
    q_len=length,
    k_len=length,
    mask_fn=mask_fn,
    transpose=layouts.BlockTranspose(
      counts, ints(1, heads, rows, by_key), counts, ints(1, heads, rows, by_key)
    ),
  )


def gradient(q, k, bias, layout, ids=None, **options):
  """Gradients of q, k, v and bias: all three kernels in one program."""
  if ids is not None:
    layout = dataclasses.replace(layout, q_segments=ids, k_segments=ids)

  def total(q, k, v, bias):
    out, lse = block_sparse_attention(
      q,
      k,
      v,
      layout,
      bias=bias,
      return_lse=True,
      implementation="tpu",
      **options,
    )
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

  return jax.grad(total, argnums=(0, 1, 2, 3))(q, k, k, bias)


def mass_gradient(q, k, bias, lines, layout):
  """Gradients of both mass sums: four kernels."""

  def total(q, k, bias, lines):
    found = masses(
      q, k, layout=layout, bias=bias, weights=lines, lse=lines,
      implementation="tpu",
    )  # fmt: skip
    return sum(jnp.sum(x**2) for x in found)

  return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(q, k, bias, lines)


def linear_operands(length, heads, groups, d, dv=None, dtype=jnp.bfloat16):
  """Operands of linear attention of one example."""
  rows = lambda heads, width: shapes(1, length, heads, width, dtype=dtype)
  dv = dv or d
  return linear_forms.Operands(
    rows(heads, d),
    rows(groups, d),
    rows(groups, dv),
    shapes(1, heads, dtype=jnp.float32),
    shapes(1, heads, d, dv, dtype=jnp.float32),
  )


def linear_gradient(operands, **options):
  """All gradients of linear attention: both kernels in one program."""

  def total(operands):
    q, k, v, log_decay, state = operands
    out, last = linear_attention(
      q,
      k,
      v,
      log_decay=log_decay,
      initial_state=state,
      return_state=True,
      implementation="tpu",
      **options,
    )
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(last)

  return jax.value_and_grad(total)(operands)


def decode(q, k, v, blocks, lengths):
  """A step over listed blocks of a cache with heads first."""
  return decode_attention(
    q, k, v, blocks=blocks, lengths=lengths, causal=True, splits=2,
    heads_first=True, return_lse=True, implementation="tpu",
  )  # fmt: skip


def decode_operands(batch=4, heads=32, groups=8, n=65536, listed=32):
  """Operands of `decode`: two queries, caches of n entries of 128."""
  cache = shapes(batch, groups, n, 128)
  ints = functools.partial(shapes, dtype=jnp.int32)
  return (
    shapes(batch, 2, heads, 128), cache, cache, ints(batch, groups, listed),
    ints(batch),
  )  # fmt: skip


def _of(attend):
  """Gradients of q, k and v."""
  total = lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32))
  return jax.grad(total, (0, 1, 2))


def compile_attention(generation, block, length=32768):
  """Compiles block-sparse attention and splash attention at equal blocks.

  One head of 128 and eight examples: heads first without moving anything.
  """
  device, q = tpu.device(generation), shapes(8, length, 1, 128)
  attend = lambda layout: lambda *qkv: block_sparse_attention(
    *qkv, layout, implementation="tpu"
  )
  ours = lambda q, k, v, layout: _of(attend(layout))(q, k, v)
  layout = lists(length, block, 16, by_key=16)
  aot.compile_for(device, ours, q, q, q, layout)
  size = dict.fromkeys(
    "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv"
    " block_kv_dkv_compute block_q_dq block_kv_dq".split(),
    block,
  )
  stock = splash.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((length, length))] * 8),
    head_shards=1, q_seq_shards=1, block_sizes=splash.BlockSizes(**size),
  )  # fmt: skip
  q = shapes(8, length, 128)
  aot.compile_for(device, lambda *qkv: _of(stock)(*qkv), q, q, q)


def compile_others(generation, block, length=16384):
  """Compiles attention mass, decode and linear attention, heads of 128."""
  device = tpu.device(generation)
  line = shapes(1, 1, length, dtype=jnp.float32)
  q, layout = shapes(1, length, 1, 128), lists(length, block, 3)
  aot.compile_for(device, mass_gradient, q, q, line, line, layout)
  aot.compile_for(device, decode, *decode_operands(n=length))
  linear = functools.partial(linear_gradient, block=block)
  aot.compile_for(device, linear, linear_operands(length, 4, 2, 128))
