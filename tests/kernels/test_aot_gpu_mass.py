"""The GPU kernels of the mass sums compile within budgets (`test_aot_gpu`)."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels import layout as layouts
from pallas_kernels.aot import gpu
from pallas_kernels.attention_mass import masses
from pallas_kernels.walks import gpu_plan
from tests.kernels.test_aot_gpu import needs_compiler
from tests.kernels.test_aot_tpu import lists, shapes

_DEFAULTS = {"width": 128, "block": 128, "local": False, "soft_cap": None}
_LOCAL = layouts.Causal() & (layouts.Window(150) | layouts.Sinks(3))


def compile_sums(width, block, local, soft_cap):
  """Compiles sums and gradients; in a process of its own."""
  layout = lists(4096, block, 8, _LOCAL if local else None)
  q, k = (shapes(1, 4096, heads, width) for heads in (4, 2))
  line = shapes(1, 4, 4096, dtype=jnp.float32)
  ids = shapes(1, 4096, dtype=jnp.int32) if local else None

  def gradient(q, k, bias, lse, layout, ids):
    def total(q, k, bias):
      columns, blocks = masses(
        q, k, layout=layout, lse=lse, bias=bias if local else None,
        q_segment_ids=ids, k_segment_ids=ids, soft_cap=soft_cap,
        implementation="gpu",
      )  # fmt: skip
      return jnp.sum(columns) + jnp.sum(blocks)

    return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, bias)

  device = gpu.device("h200")
  aot.compile_for(device, gradient, q, k, line, line, layout, ids)


@functools.cache
def kernels(call):
  """Reports of the kernels of one call, by name."""
  found = gpu.report(
    "from tests.kernels import test_aot_gpu_mass as tests\n"
    f"tests.compile_sums(**{_DEFAULTS | json.loads(call)})"
  )
  return {x.name.removeprefix("attention_mass"): x for x in found}


def check(found):
  assert sorted(found) == ["", "_d_k", "_d_q"]
  for name, kernel in found.items():
    assert kernel.spilled == 0 and not kernel.warnings, name
    assert not gpu.hazards(kernel.sass), name
    assert kernel.registers <= 65536 // 384
    assert kernel.shared_memory <= gpu_plan.SHARED_MEMORY


@needs_compiler
def test_instructions_are_those_that_the_design_counts_on():
  """Per tile of two loops (full and partial blocks), counted in the PTX."""
  found = kernels("{}")
  check(found)
  for name, kernel in found.items():
    tile = 64 if name else 128
    # Scores over the head size, and gradients over the tile.
    depth = 128 + (tile if name else 0)
    assert kernel.count(r"wgmma\.mma_async") == 2 * depth // 16
    # One exponential an element, and no other.
    assert kernel.count(r"ex2\.approx") == 2 * 64 * tile // 128
    assert kernel.count(r"\b(ld|st)\.local") == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  "call",
  [
    {"width": 64, "block": 64, "local": True},
    {"width": 256, "local": True, "soft_cap": 20.0},
  ],
  ids=json.dumps,
)
def test_nothing_is_spilled_with_options(call):
  check(kernels(json.dumps(call)))
