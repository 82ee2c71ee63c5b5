"""What the report times on a GPU compiles for one, at the sizes it is timed.

Needs the extra `gpuaot`, and skips where it is not installed.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from bench import candidates
from pallas_kernels import aot, decode_attention, linear_attention
from pallas_kernels import layout as layouts
from pallas_kernels.aot import gpu
from pallas_kernels.attention_mass import masses
from pallas_kernels.walks import gpu_plan
from scripts.report import operations, sparse, tiles

pytestmark = pytest.mark.skipif(
  gpu.missing() is not None, reason=str(gpu.missing())
)

SETTING = sparse.Setting("32k", 32768, "gpu")


def compile_for_gpu(setting, kind, direction):
  """Attention of a setting, as stage c calls it."""
  make = functools.partial(
    candidates.random_inputs, setting, 1, setting.length, setting.head_size
  )
  inputs = jax.eval_shape(make)
  layout = jax.eval_shape(lambda: sparse.layout_of.__wrapped__(setting, kind))
  attend = candidates.attention("gpu")

  def run(q, k, v, layout):
    if direction == "forward":
      return attend(q, k, v, layout)
    out, back = jax.vjp(lambda *x: attend(*x, layout), q, k, v)
    return back(out)

  return aot.compile_for(gpu.device("h200"), run, *inputs, layout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal top-k", "full"])
def test_timed_layouts_compile_forward_and_backward(kind):
  compiled = compile_for_gpu(SETTING, kind, "backward")
  rows = 32768 * 32 * 128 * 2
  memory = compiled.memory_analysis()
  assert memory.output_size_in_bytes >= 3 * rows
  # Nothing of the size of the attention matrix.
  assert memory.temp_size_in_bytes < 8 * rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "d_q", "d_kv"])
def test_the_farthest_tiles_compile(kind):
  plans = tiles.plans_of(SETTING, kind)
  assert len(plans) >= 9
  with gpu_plan.changing(kind, **plans[-1]):
    compile_for_gpu(SETTING, "top-k", tiles.KINDS[kind])


def operation(name, n):
  """A call of stage d, and the shapes of its arrays."""
  shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
  heads, width = operations.HEADS, operations.HEAD_SIZE
  if name == "mass":
    layout = layouts.from_pattern(layouts.Causal(), q_len=n).with_transpose()
    q, lse = shape(1, n, heads, width), shape(1, heads, n, dtype=jnp.float32)
    call = lambda q, k, lse, layout: masses(
      q, k, lse=lse, layout=layout, implementation="gpu"
    )
    return call, (q, q, lse, jax.eval_shape(lambda: layout))
  if name == "linear":
    call = functools.partial(linear_attention, implementation="gpu")
    return call, (shape(1, n, heads, width),) * 3
  batch, groups = operations.BATCH, operations.GROUPS
  k = shape(batch, n, groups, width)
  count = n // 1280 if name == "blocks" else operations.TOKENS
  listed = shape(batch, groups, count, dtype=jnp.int32)
  call = lambda q, k, v, listed: decode_attention(
    q, k, v, **{name: listed}, splits=operations.SPLITS, implementation="gpu"
  )
  return call, (shape(batch, 1, heads, width), k, k, listed)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "n", "direction"),
  [
    ("blocks", 131072, "forward"),
    ("tokens", 131072, "forward"),
    ("mass", 16384, "backward"),
    ("linear", 32768, "backward"),
  ],
)
def test_timed_operations_compile(name, n, direction):
  call, inputs = operation(name, n)

  def run(q, k, *rest):
    if direction == "forward":
      return call(q, k, *rest)
    out, back = jax.vjp(lambda q, k: call(q, k, *rest), q, k)
    return out, back(out)

  compiled = aot.compile_for(gpu.device("h200"), run, *inputs)
  memory = compiled.memory_analysis()
  rows = max(math.prod(x.shape) for x in inputs[:2]) * 2
  # States and what is gathered, but nothing of the size of all pairs.
  assert memory.temp_size_in_bytes < 12 * rows
