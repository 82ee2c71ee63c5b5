"""The GPU kernels compile to Hopper machine code, within budgets, without GPU.

Needs the extra `gpuaot`, and skips where it is not installed.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels import layout as layouts
from pallas_kernels.aot import gpu
from pallas_kernels.block_sparse_attention import api
from pallas_kernels.walks import gpu_plan
from tests.kernels.test_aot_tpu import lists, shapes

needs_compiler = pytest.mark.skipif(
  gpu.missing() is not None, reason=str(gpu.missing())
)

_PREFIX = "block_sparse_attention_"
# Of each kernel: whole products of a tile, and products whose left factor is
# in registers (probabilities and gradients of scores).
_PRODUCTS = {
  "forward": (2, 1),
  "d_q": (3, 1),
  "d_kv": (4, 2),
  "d_k": (3, 1),
  "d_v": (2, 1),
}


def compile_gradient(width, block, mask, options):
  """Compiles forward and backward; called in a process of its own."""
  layout = lists(4096, block, 8, mask)
  q, k = (
    shapes(1, 4096, heads, width, dtype=jnp.dtype(options["dtype"]))
    for heads in (4, 2)
  )
  bias = shapes(1, 4, 4096, dtype=jnp.float32)
  ids = shapes(1, 4096, dtype=jnp.int32) if options["segments"] else None

  def gradient(q, k, bias, layout, ids):
    def total(q, k, v, bias):
      out, lse = api.block_sparse_attention(
        q,
        k,
        v,
        layout,
        bias=bias if options["bias"] else None,
        q_segment_ids=ids,
        k_segment_ids=ids,
        soft_cap=options["soft_cap"],
        return_lse=True,
        implementation="gpu",
      )
      return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return jax.grad(total, argnums=(0, 1, 2, 3))(q, k, k, bias)

  aot.compile_for(gpu.device("h200"), gradient, q, k, bias, layout, ids)


@functools.cache
def kernels(width, block=128, mask="None", **options):
  """Reports of the kernels of one call, by name."""
  defaults = {
    "dtype": "bfloat16",
    "segments": False,
    "bias": False,
    "soft_cap": None,
  }
  source = (
    "from pallas_kernels import layout as layouts\n"
    "from tests.kernels import test_aot_gpu as tests\n"
    f"tests.compile_gradient({width}, {block}, {mask}, {defaults | options})"
  )
  return {x.name.removeprefix(_PREFIX): x for x in gpu.report(source)}


# Bytes that the forward kernel spills in partial blocks that have everything.
_PARTIAL = 72
_LOCAL = (
  "layouts.Causal() & (layouts.Window(150) | layouts.Sinks(3)) | "
  "layouts.Global(4, 7)"
)


@needs_compiler
@pytest.mark.parametrize("width", [64, 128])
def test_nothing_is_spilled(width):
  found = kernels(width)
  assert sorted(found) == ["d_kv", "d_q", "forward"]
  for name, kernel in found.items():
    assert kernel.spilled == 0, name
    assert not kernel.warnings, name
    assert not gpu.hazards(kernel.sass), name
    # Three warpgroups share 65536 registers, before they share them anew.
    assert kernel.registers <= 65536 // 384
    assert kernel.shared_memory <= gpu_plan.SHARED_MEMORY


@needs_compiler
@pytest.mark.parametrize("width", [64, 128])
def test_instructions_are_those_that_the_design_counts_on(width):
  """Per tile of two loops (full and partial blocks), counted in the PTX."""
  for name, kernel in kernels(width).items():
    tile = 128 if name == "forward" else 64
    # Forward, the first scores (full or partial) and the last values of a row
    # stand outside of the loops.
    scores, values = (4, 3) if name == "forward" else (2, 2)
    # A product over `width` takes width / 16 instructions, one over the tile
    # as many as its rows: [64, tile] @ [tile, width].
    products, from_registers = _PRODUCTS[name]
    expected = scores * (products - from_registers) * width
    expected += values * from_registers * tile
    assert kernel.count(r"wgmma\.mma_async") == expected // 16
    # One exponential an element, and two rows a thread for the running sum.
    extra = 2 * scores if name == "forward" else 0
    assert kernel.count(r"ex2\.approx") == scores * 64 * tile // 128 + extra
    assert kernel.count(r"\b(ld|st)\.local") == 0
    assert kernel.count(r"cp\.async\.bulk\.tensor|cp\.async\.bulk\.shared") > 1
    assert kernel.count("setmaxnreg") == 2
    if kernel.sass:
      assert "HGMMA" in kernel.sass and "HMMA" not in kernel.sass


@needs_compiler
@pytest.mark.parametrize("width", [64, 128])
def test_exponentials_are_computed_beside_the_last_values(width):
  """Between the waits for the scores and for the sum, in the forward loop."""
  sass = kernels(width)["forward"].sass
  if not sass:
    pytest.skip("nvdisasm is not installed")
  waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, ", sass)
  beside = [x.count("MUFU.EX2") for x in waits if x.startswith("0x1")]
  assert beside == [66]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  "call",
  [
    {"width": 128, "mask": _LOCAL, "bias": True, "segments": True},
    {"width": 128, "mask": "layouts.Causal()", "soft_cap": 20.0},
    {"width": 64, "block": 64, "mask": _LOCAL, "segments": True},
    {"width": 128, "block": 256, "dtype": "float16"},
    {"width": 192, "mask": _LOCAL, "bias": True, "soft_cap": 20.0},
    {"width": 256, "mask": "layouts.Causal()"},
    {"width": 256, "block": 64, "mask": _LOCAL, "bias": True},
    # The most that there is to keep, and a pass of its own for d_bias.
    {
      "width": 256,
      "mask": _LOCAL,
      "bias": True,
      "segments": True,
      "soft_cap": 20.0,
    },
  ],
  ids=json.dumps,
)
def test_nothing_more_is_spilled_with_options(call):
  # With JAX 0.12 a lane's offset does not fit, of everything at once at 128.
  allowed = 0 if jax.__version_info__ < (0, 11) else 4
  masked = call.get("segments") and call["width"] == 128 and call.get("bias")
  for name, kernel in kernels(**call).items():
    # What a row has left over from the tile before, in partial blocks.
    most = _PARTIAL if masked and name == "forward" else allowed
    assert kernel.spilled <= most, name
    assert kernel.shared_memory <= gpu_plan.SHARED_MEMORY
    assert not any("serializ" in line for line in kernel.warnings), name
    assert not gpu.hazards(kernel.sass), name


def test_the_target_decides_what_is_picked():
  q = shapes(1, 256, 2, 64)
  layout = layouts.full(q_len=256)
  with aot.compiling_for("gpu"):
    assert api.resolve_implementation(q, q, q, layout) == "gpu"
    short = layouts.full(q_len=256, block_q=16)
    assert api.resolve_implementation(q, q, q, short) == "xla"


def test_a_register_used_too_early_is_found():
  code = """
    /*0010*/  HGMMA.64x64x16.F32.BF16 R152, gdesc[UR16], RZ, !UPT
    /*0020*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0
    /*0030*/  WARPGROUP.DEPBAR.LE gsb0, 0x1
    /*0040*/  FADD R152, R183, R1
    /*0050*/  @P0 FADD R2, R87, R1
    /*0060*/  WARPGROUP.DEPBAR.LE gsb0, 0x0
    /*0070*/  FADD R2, R87, R1
  """
  (line,) = gpu.hazards(code)
  assert line.startswith("/*0050*/")


def test_a_left_factor_that_is_overwritten_is_found():
  code = """
    /*0010*/  HGMMA.64x128x16.F32.BF16 R24, R164, gdesc[UR16].tnspB, R24
    /*0020*/  HGMMA.64x128x16.F32.BF16 R24, R160, gdesc[UR16].tnspB, R24, gsb0
    /*0030*/  FADD R2, R160, R165
    /*0040*/  F2FP.BF16.F32.PACK_AB R163, R3, R2
    /*0050*/  WARPGROUP.DEPBAR.LE gsb0, 0x0
    /*0060*/  F2FP.BF16.F32.PACK_AB R164, R3, R2
  """
  (line,) = gpu.hazards(code)
  assert line.startswith("/*0040*/")


@needs_compiler
def test_a_failing_compilation_says_why():
  with pytest.raises(RuntimeError, match="compilation failed[^$]*no such size"):
    gpu.report("raise ValueError('no such size')")


def test_what_is_missing_or_unknown_is_named(monkeypatch):
  with pytest.raises(ValueError, match="allowed: 'h100', 'h200'"):
    gpu.device("v100")
  monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(RuntimeError, match="pip install"):
    gpu.device()


def test_every_head_size_fits_the_shared_memory():
  """With blocks of both sizes, and with what is moved line by line."""
  forward = set()
  for width in range(64, 257, 64):
    for v_width in range(64, 257, 64):
      for block in (64, 128):
        for kind in ("forward", "d_q", "d_kv", "d_v"):
          plan = gpu_plan.make(_operands(width, v_width, block), kind)
          assert plan.shared_memory() <= gpu_plan.SHARED_MEMORY
          if kind == "forward" and width == v_width:
            forward.add(plan.depth)
  assert min(forward) >= 2, "what comes next is not loaded ahead"


def _operands(width, v_width, block):
  layout = lists(512, block, 4)
  q, v = (shapes(1, 512, 2, size) for size in (width, v_width))
  return api.contract.Operands(q, q, v, None, layout)


def test_a_plan_can_be_changed_for_tuning():
  operands = _operands(128, 128, 128)
  own = gpu_plan.make(operands, "forward")
  with gpu_plan.changing("forward", tile=64, depth=3):
    with gpu_plan.changing("d_q", depth=2):
      changed = gpu_plan.make(operands, "forward")
      assert gpu_plan.make(operands, "d_q").depth == 2
    assert gpu_plan.make(operands, "d_kv").depth == own.depth + 2
  assert (changed.tile, changed.depth) == (64, 3) != (own.tile, own.depth)
  assert gpu_plan.make(operands, "forward") == own
