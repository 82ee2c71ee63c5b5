"""The TPU kernels compile for every generation, within budgets, without TPU."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, decode_attention
from pallas_kernels import layout as layouts
from pallas_kernels.aot import llo, tpu
from pallas_kernels.block_sparse_attention import api
from pallas_kernels.linear_attention import operands as linear_forms
from pallas_kernels.linear_attention import tpu as linear_tpu
from pallas_kernels.linear_attention import tpu_plan as linear_plan
from scripts import tpu_table
from scripts.tpu_programs import (
  decode,
  decode_operands,
  gradient,
  linear_gradient,
  linear_operands,
  lists,
  mass_gradient,
  shapes,
)

pytestmark = pytest.mark.skipif(
  tpu.missing() is not None, reason=str(tpu.missing())
)

GENERATIONS = tuple(tpu.TOPOLOGIES)


@pytest.mark.parametrize(
  ("generation", "length", "block", "capacity"),
  [
    ("v5e", 131072, 128, 102),
    ("v5p", 4096, 512, 4),
    ("v6e", 4096, 256, 8),
    ("v7x", 16384, 128, 16),
  ],
)
def test_compiles_within_budgets(generation, length, block, capacity):
  """Long lists fit in scalar memory; nothing of the size of S^2 is held."""
  heads, groups, width = 2, 2, 128
  layout = lists(length, block, capacity, layouts.Causal())
  q, k = (shapes(1, length, n, width) for n in (heads, groups))
  bias = shapes(1, heads, length, dtype=jnp.float32)
  compiled = aot.compile_for(
    tpu.device(generation), gradient, q, k, bias, layout
  )
  found = aot.report(compiled)
  # q, out and their gradients, k, v and theirs: each once with heads first,
  # and once more where it is moved; the lists, and counts in padded rows.
  tensors = 2 * (4 * heads + 4 * groups) * length * width * 2
  rows = length // block
  assert found.temporaries < tensors + 4 * 4 * rows * (2 * rows + 4 * 128)
  # Scores of one head would take more.
  assert found.temporaries < length * length * 4
  blocks = heads * rows * min(capacity + 2, rows)
  products = 2 + 3 + 4
  assert found.flops == pytest.approx(
    2 * products * blocks * block * block * width, rel=0.05
  )
  assert found.bytes_accessed > tensors / 2


_MIXED = layouts.PerHead(
  (
    layouts.Causal(),
    layouts.Window(9, 5) | layouts.Sinks(3),
    ~layouts.Global(4, 7),
    layouts.criss_cross(40),
  )
)


@pytest.mark.parametrize(
  ("width", "dtype", "mask_fn", "options"),
  [
    (64, jnp.bfloat16, _MIXED, {"soft_cap": 20.0}),
    (256, jnp.float32, None, {"precision": "highest"}),
  ],
)
def test_options_compile(width, dtype, mask_fn, options):
  """Segments, bias and all kinds of mask functions, heads packed by two."""
  layout = lists(1024, 128, 4, mask_fn)
  q, k = (shapes(1, 1024, n, width, dtype=dtype) for n in (4, 2))
  compiled = aot.compile_for(
    tpu.device("v5e"),
    functools.partial(gradient, **options),
    q,
    k,
    shapes(1, 4, 1024, dtype=jnp.float32),
    layout,
    shapes(1, 1024, dtype=jnp.int32),
  )
  assert aot.report(compiled).flops > 0


def test_stored_masks_and_tags_compile():
  """A stored mask, and two mask functions told apart by tags."""
  stored = functools.partial(layouts.from_mask, block_q=128, block_k=128)
  tagged = lambda: layouts.union(
    layouts.from_pattern(layouts.Causal(), q_len=512),
    layouts.from_pattern(layouts.Dilated(48), q_len=512),
  )
  q, k = shapes(1, 512, 4, 128), shapes(1, 512, 2, 128)
  bias = shapes(1, 4, 512, dtype=jnp.float32)
  for layout in (
    jax.eval_shape(stored, shapes(1, 2, 512, 512, dtype=bool)),
    jax.eval_shape(tagged),
  ):
    compiled = aot.compile_for(tpu.device("v5e"), gradient, q, k, bias, layout)
    assert aot.report(compiled).flops > 0


@pytest.mark.parametrize("generation", GENERATIONS)
def test_attention_mass_compiles_within_budgets(generation):
  length, heads, groups = 16384, 1, 1
  layout = lists(length, 128, 3, layouts.Causal())
  q, k = (shapes(1, length, n, 128) for n in (heads, groups))
  line = shapes(1, heads, length, dtype=jnp.float32)
  compiled = aot.compile_for(
    tpu.device(generation), mass_gradient, q, k, line, line, layout
  )
  found, rows = aot.report(compiled), length // 128
  assert found.flops > 0
  # q and k heads first and their gradients; numbers of tokens and of blocks,
  # and lists by key and by query.
  tensors = 2 * (heads + groups) * length * 128 * 2
  numbers = 8 * heads * (length + rows * rows) * 4
  assert found.temporaries < tensors + numbers + 4 * rows * (2 * rows + 512) * 4
  assert found.temporaries < length * length * 4


@pytest.mark.parametrize("generation", GENERATIONS)
def test_decode_compiles_and_moves_nothing_but_what_is_listed(generation):
  """A cache of 64k entries, heads first, of which 4k are listed."""
  batch, groups, listed = 4, 8, 32
  compiled = aot.compile_for(
    tpu.device(generation), decode, *decode_operands(groups=groups)
  )
  found = aot.report(compiled)
  assert found.temporaries < 2**21
  entries = batch * groups * listed * 128
  assert found.bytes_accessed == pytest.approx(
    entries * 2 * 128 * 2, rel=0.05, abs=2**22
  )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_linear_attention_compiles_within_budgets(generation):
  """Memory and products follow the length, states are kept once a cell."""
  length, heads, groups, d, block = 65536, 4, 2, 128, 128
  operands = linear_operands(length, heads, groups, d)
  compiled = aot.compile_for(tpu.device(generation), linear_gradient, operands)
  found = aot.report(compiled)
  # q, out and their gradients, k, v and theirs, each with heads side by side.
  tensors = (4 * heads + 4 * groups) * length * d * 2
  kept = heads * (length // linear_plan.CELL_TOKENS) * d * d * 4
  assert found.temporaries < tensors + kept
  within, across = 2 + 5, 2 + 5
  assert found.flops == pytest.approx(
    2 * length * heads * (within * block * d + across * d * d), rel=0.01
  )
  assert found.bytes_accessed > tensors


def test_options_of_linear_attention_compile():
  """Head sizes and a length that need padding, float32 in full."""
  operands = linear_operands(1100, 4, 2, 64, 96, jnp.float32)
  run = functools.partial(
    linear_gradient, block=64, precision="highest", scale=0.5
  )
  compiled = aot.compile_for(tpu.device("v6e"), run, operands)
  assert aot.report(compiled).flops > 0


@pytest.mark.parametrize(
  ("heads", "groups", "d", "block"), [(32, 1, 256, 256), (1, 1, 128, 1024)]
)
def test_the_estimate_of_vmem_of_linear_attention_is_not_too_low(
  heads, groups, d, block
):
  """What nearly fills the limit, by states or by tiles, compiles."""
  operands = linear_operands(2048, heads, groups, d)
  params = linear_forms.Params(1.0, block)
  assert linear_tpu.supports(operands, params) is None
  plan = linear_plan.make(operands, params)
  assert plan.vmem(plan.together) > 0.9 * linear_plan.VMEM_LIMIT
  run = functools.partial(linear_gradient, block=block)
  compiled = aot.compile_for(tpu.device("v7x"), run, operands)
  assert aot.report(compiled).flops > 0


def test_short_heads_and_ragged_caches_are_refused():
  """What the decode kernel cannot read is said before it is compiled."""
  q, cache = shapes(1, 1, 4, 64), shapes(1, 2, 512, 64)
  call = functools.partial(
    decode_attention, heads_first=True, implementation="tpu_interpret"
  )
  with pytest.raises(
    NotImplementedError, match="head size 64.*multiple of 128"
  ):
    jax.eval_shape(call, q, cache, cache)
  q, cache = shapes(1, 1, 4, 128), shapes(1, 2, 500, 128)
  with pytest.raises(NotImplementedError, match="the cache has 500 entries"):
    jax.eval_shape(call, q, cache, cache)
  with pytest.raises(NotImplementedError, match="platform is 'cpu'"):
    jax.eval_shape(
      functools.partial(call, implementation="tpu"), q, cache, cache
    )


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "block"), [("v5e", 128), ("v6e", 512)])
def test_the_matrix_unit_is_as_busy_as_in_splash(generation, block):
  """Bundles per block of scores, which all take the same products."""
  found = llo.schedules(
    "from scripts import tpu_programs;"
    f" tpu_programs.compile_attention({generation!r}, {block})",
    [*tpu_table.ATTENTION, *tpu_table.ATTENTION.values()],
  )
  # Shorter blocks are taken several at a time.
  together = 512 // block
  for ours, stock in tpu_table.ATTENTION.items():
    own, other = (llo.main_loop(found[name]) for name in (ours, stock))
    assert own.bundles / together <= other.bundles, (ours, own, other)


@pytest.mark.slow
@pytest.mark.parametrize("block", [128, 512])
def test_lists_of_a_million_tokens_fit_the_scalar_memory(block):
  """All gradients of one head; three of its arrays, moved, and the lists."""
  found = tpu_table.memory_of("v5e", 2**20, block, 64)
  assert found.endswith(" MiB"), found
  assert int(found.split()[0]) < 3 * 2**20 * 128 * 2 / 2**20 + 64


def test_the_main_loop_is_the_one_with_most_work():
  loops = [
    llo.Loop(1, 479, 0.46, 75),
    llo.Loop(2, 30, 0.6, 0),
    llo.Loop(2, 360, 0.56, 60),
    llo.Loop(2, 380, 0.56 * 360 / 380, 61),
  ]
  assert llo.main_loop(loops) == loops[2]


def test_a_stopped_table_goes_on_only_with_the_same_kernels(tmp_path):
  kept = tmp_path / "table.md.json"
  none = tpu_table.unfinished(kept)
  assert none["schedules"] == none["memory"] == {}
  kept.write_text(json.dumps(none | {"memory": {"v5e 1 2 3": "4 MiB"}}))
  assert tpu_table.unfinished(kept)["memory"] == {"v5e 1 2 3": "4 MiB"}
  kept.write_text(json.dumps({"of": "others", "memory": {"v5e 1 2 3": ""}}))
  assert tpu_table.unfinished(kept) == none


def test_the_table_of_schedules_has_a_row_for_each_kernel():
  loop = llo.Loop(2, 137, 0.99, 3)
  names = (*tpu_table.ATTENTION, *tpu_table.ATTENTION.values())
  found = {"v5e 128": dict.fromkeys((*names, *tpu_table.OTHERS), loop)}
  page = tpu_table.document(found, {"v5e 131072 128 102": "12 MiB"})
  assert "`decode_attention` | 137 | 99% | 3 | - | - | - |" in page
  assert "| 137 | 99% | 3 | 137 | 99% | 3 |" in page
  assert "| v5e | 131072 | 128 | 102 | 12 MiB |" in page
  assert page.count("| v5e | 128 |") == 10


def test_the_estimate_of_vmem_is_not_too_low():
  """The largest blocks that are accepted compile."""
  layout = lists(4096, 1024, 4)
  q = shapes(1, 4096, 1, 128)
  bias = shapes(1, 1, 4096, dtype=jnp.float32)
  compiled = aot.compile_for(tpu.device("v7x"), gradient, q, q, bias, layout)
  assert aot.report(compiled).temporaries < 64 * 2**20


def test_the_target_decides_what_is_picked():
  q = shapes(1, 256, 2, 64)
  layout = layouts.full(q_len=256)
  assert api.resolve_implementation(q, q, q, layout) == "xla"
  with aot.compiling_for("tpu"):
    assert api.resolve_implementation(q, q, q, layout) == "tpu"
    short = layouts.full(q_len=256, block_q=64)
    assert api.resolve_implementation(q, q, q, short) == "xla"


def test_what_is_missing_or_unknown_is_named(monkeypatch):
  with pytest.raises(ValueError, match="allowed: 'v5e', 'v5p', 'v6e', 'v7x'"):
    tpu.device("v3")
  with pytest.raises(ValueError, match="allowed: 'cpu', 'gpu', 'tpu'"):
    aot.compiling_for("rocm").__enter__()
  with pytest.raises(RuntimeError, match="compilation failed"):
    llo.schedules("raise ValueError", ())
  monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(RuntimeError, match="pip install"):
    tpu.device("v5e")
