"""The TPU kernels compile for every generation, within budgets, without TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
  aot,
  block_sparse_attention,
  decode_attention,
  linear_attention,
)
from pallas_kernels import layout as layouts
from pallas_kernels.aot import llo, tpu
from pallas_kernels.attention_mass import masses
from pallas_kernels.block_sparse_attention import api
from pallas_kernels.linear_attention import operands as linear_forms
from pallas_kernels.linear_attention import tpu as linear_tpu
from pallas_kernels.linear_attention import tpu_plan as linear_plan

pytestmark = pytest.mark.skipif(
  tpu.missing() is not None, reason=str(tpu.missing())
)

GENERATIONS = tuple(tpu.TOPOLOGIES)


def shapes(*sizes, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(sizes, dtype)


def lists(length, block, capacity, mask_fn=None, heads=1, by_key=None):
  """A layout of shapes: what is in the lists does not matter here."""
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


def mass_gradient(q, k, bias, lines, layout):
  """Gradients of both mass sums: four kernels."""

  def total(q, k, bias, lines):
    found = masses(
      q, k, layout=layout, bias=bias, weights=lines, lse=lines,
      implementation="tpu",
    )  # fmt: skip
    return sum(jnp.sum(x**2) for x in found)

  return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(q, k, bias, lines)


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
  batch, heads, groups, n, listed = 4, 32, 8, 65536, 32
  cache = shapes(batch, groups, n, 128)
  ints = functools.partial(shapes, dtype=jnp.int32)

  def decode(q, k, v, blocks, lengths):
    return decode_attention(
      q, k, v, blocks=blocks, lengths=lengths, causal=True, splits=2,
      heads_first=True, return_lse=True, implementation="tpu",
    )  # fmt: skip

  compiled = aot.compile_for(
    tpu.device(generation), decode, shapes(batch, 2, heads, 128), cache, cache,
    ints(batch, groups, listed), ints(batch),
  )  # fmt: skip
  found = aot.report(compiled)
  assert found.temporaries < 2**21
  entries = batch * groups * listed * 128
  assert found.bytes_accessed == pytest.approx(
    entries * 2 * 128 * 2, rel=0.05, abs=2**22
  )


def linear_operands(length, heads, groups, d, dv=None, dtype=jnp.bfloat16):
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


_SCHEDULES = """
import jax, jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash, splash_attention_mask as masks)
from pallas_kernels import aot, block_sparse_attention, layout
from pallas_kernels.aot import tpu
from tests.kernels import test_aot_tpu as tests

n, block, device = 32768, {block}, tpu.device("{generation}")
# One head and eight examples: heads first without moving anything.
q = tests.shapes(8, n, 1, 128)
total = lambda x: jnp.sum(x.astype(jnp.float32))
of = lambda attend: jax.grad(lambda *qkv: total(attend(*qkv)), (0, 1, 2))
ours = lambda q, k, v, layout: of(lambda *qkv: block_sparse_attention(
  *qkv, layout, implementation="tpu"))(q, k, v)
aot.compile_for(device, ours, q, q, q, tests.lists(n, block, 16, by_key=16))
size = dict.fromkeys(
  "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv "
  "block_kv_dkv_compute block_q_dq block_kv_dq".split(), block)
stock = splash.make_splash_mha(
  masks.MultiHeadMask([masks.CausalMask((n, n))] * 8), head_shards=1,
  q_seq_shards=1, block_sizes=splash.BlockSizes(**size))
q = tests.shapes(8, n, 128)
aot.compile_for(device, lambda q, k, v: of(stock)(q, k, v), q, q, q)
"""
_PAIRS = {
  "block_sparse_attention_forward.1": "splash_mha_fwd_residuals.1",
  "block_sparse_attention_d_q.1": "splash_mha_dq_no_residuals.1",
  "block_sparse_attention_d_kv.1": "splash_mha_dkv_no_residuals.1",
}


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "block"), [("v5e", 128), ("v6e", 512)])
def test_the_matrix_unit_is_as_busy_as_in_splash(generation, block):
  """Bundles per block of scores, which all take the same products."""
  found = llo.schedules(
    _SCHEDULES.format(generation=generation, block=block),
    [*_PAIRS, *_PAIRS.values()],
  )
  # Shorter blocks are taken several at a time.
  together = 512 // block
  for ours, stock in _PAIRS.items():
    own, other = (llo.main_loop(found[name]) for name in (ours, stock))
    assert own.bundles / together <= other.bundles, (ours, own, other)


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
