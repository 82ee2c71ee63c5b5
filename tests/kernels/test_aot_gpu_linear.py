"""The GPU kernel of linear attention, compiled; see `test_aot_gpu`."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, linear_attention
from pallas_kernels.aot import gpu
from pallas_kernels.walks import gpu_plan
from tests.kernels.test_aot_gpu import needs_compiler
from tests.kernels.test_aot_tpu import shapes


def compile_gradient(width, v_width):
  """Compiles forward and backward; in a process of its own."""
  q, k = (shapes(1, 2000, heads, width) for heads in (4, 2))
  v = shapes(1, 2000, 2, v_width)
  decay = shapes(4, dtype=jnp.float32)

  def gradient(q, k, v, decay):
    def total(*x):
      out = linear_attention(*x, log_decay=decay, implementation="gpu")
      return jnp.sum(out.astype(jnp.float32))

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

  aot.compile_for(gpu.device("h200"), gradient, q, k, v, decay)


@functools.cache
def kernels(*widths):
  """Reports of the kernels of one call."""
  return gpu.report(
    "from tests.kernels import test_aot_gpu_linear as tests\n"
    f"tests.compile_gradient{widths}"
  )


def check(found):
  assert found
  for kernel in found:
    assert kernel.name == "linear_attention"
    assert kernel.spilled == 0 and not kernel.warnings
    assert not gpu.hazards(kernel.sass)
    assert kernel.registers <= 65536 // 384
    assert kernel.shared_memory <= gpu_plan.SHARED_MEMORY


@needs_compiler
def test_instructions_are_those_that_the_design_counts_on():
  """Of two loops (earlier tiles, and the rows' own), counted in the PTX."""
  found = kernels(128, 128)
  check(found)
  for kernel in found:
    # Scores and their products with values, and the state once.
    assert kernel.count(r"wgmma\.mma_async") == 2 * (8 + 8) + 8
    # A power of the decay each element, and a row for the state.
    assert kernel.count(r"ex2\.approx") == 2 * 64 + 2
    assert kernel.count(r"\b(ld|st)\.local") == 0


@needs_compiler
@pytest.mark.slow
def test_nothing_is_spilled_with_other_widths():
  check(kernels(64, 128))
