"""The GPU kernel of decoding compiles within budgets; see `test_aot_gpu`."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, decode_attention
from pallas_kernels.aot import gpu
from pallas_kernels.walks import gpu_plan
from tests.kernels.test_aot_gpu import needs_compiler
from tests.kernels.test_aot_tpu import shapes

_DEFAULTS = {
  "how": "blocks", "share": 4, "tokens": 1, "causal": False, "bias": False,
  "soft_cap": None, "heads_first": False, "width": 128, "block": 128,
  "dtype": "bfloat16",
}  # fmt: skip
BATCH, GROUPS, N = 2, 8, 4096


def compile_decode(how, share, tokens, bias, width, block, dtype, **options):
  """Compiles a call; in a process of its own."""
  dtype = jnp.dtype(dtype)
  heads = GROUPS * share
  cache = (GROUPS, N) if options["heads_first"] else (N, GROUPS)
  q = shapes(BATCH, tokens, heads, width, dtype=dtype)
  k = shapes(BATCH, *cache, width, dtype=dtype)
  given = {"lengths": shapes(BATCH, dtype=jnp.int32)}
  if bias:
    given["bias"] = shapes(BATCH, heads, N, dtype=jnp.float32)
  if how is not None:
    count = 8 if how == "blocks" else 512
    given[how] = shapes(BATCH, GROUPS, count, dtype=jnp.int32)

  def attend(q, k, v, given):
    return decode_attention(
      q, k, v, **given, **options, splits=8, block_size=block,
      implementation="gpu",
    )  # fmt: skip

  aot.compile_for(gpu.device("h200"), attend, q, k, k, given)


@functools.cache
def kernel(call):
  """The report of a call's kernel."""
  options = _DEFAULTS | json.loads(call)
  (found,) = gpu.report(
    "from tests.kernels import test_aot_gpu_decode as tests\n"
    f"tests.compile_decode(**{options})"
  )
  return found


def check(found, spilled=0):
  assert found.name == "decode_attention"
  assert found.spilled <= spilled
  assert bool(found.warnings) == bool(found.spilled)
  assert not gpu.hazards(found.sass)
  assert found.shared_memory <= gpu_plan.SHARED_MEMORY
  # Two warpgroups share the 65536 registers.
  assert found.registers <= 255


@needs_compiler
def test_a_read_costs_what_the_design_counts_on():
  """One loop over tiles of 128 entries, counted in the PTX."""
  found = kernel("{}")
  check(found)
  # [64, 128] @ [128, 128] twice, 16 deep an instruction.
  assert found.count(r"wgmma\.mma_async") == 16
  # One exponential an element, one a row for the sums, none elsewhere.
  assert found.count(r"ex2\.approx") == 64 * 128 // 128 + 2
  assert found.count(r"cp\.async\.bulk\.tensor") >= 4


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  "call",
  [
    {"how": None, "heads_first": True, "width": 64, "block": 64},
    {"how": "tokens", "tokens": 3, "causal": True, "bias": True},
    {"share": 16, "dtype": "float16", "block": 512},
    {"width": 256, "share": 16, "bias": True, "soft_cap": 20.0},
  ],
  ids=json.dumps,
)  # fmt: skip
def test_nothing_is_spilled_with_options(call):
  check(kernel(json.dumps(call)))


@needs_compiler
@pytest.mark.slow
def test_everything_at_once_spills_little():
  """Sums of 256 columns, biases, a cap, and rows that see different ends."""
  everything = {
    "width": 256, "share": 16, "tokens": 4, "causal": True, "bias": True,
    "soft_cap": 20.0,
  }  # fmt: skip
  allowed = 116 if jax.__version_info__ < (0, 11) else 40
  check(kernel(json.dumps(everything)), allowed)
