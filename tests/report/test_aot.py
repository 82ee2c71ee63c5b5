"""What the report times on a GPU compiles for one, at the sizes it is timed.

Needs the extra `gpuaot`, and skips where it is not installed.
"""

import functools

import jax
import pytest

from bench import candidates
from pallas_kernels import aot
from pallas_kernels.aot import gpu
from pallas_kernels.walks import gpu_plan
from scripts.report import sparse, tiles

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
