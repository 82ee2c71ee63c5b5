"""One body of tests over all implementations of block-sparse attention."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as arrays_of

from pallas_kernels import aot, block_sparse_attention
from pallas_kernels import layout as layouts
from pallas_kernels.block_sparse_attention import api, registry
from pallas_kernels.walks import blocks, contract
from tests.kernels import cases, oracle

# Compiled accelerator kernels run elsewhere; interpreters run here.
IMPLEMENTATIONS = tuple(
  name
  for name, found in registry.implementations().items()
  if "cpu" in found.platforms
  or name.endswith("_interpret")
  or name == "reference"
)
BY_NAME = {case.name: case for case in cases.CASES}

every_case = pytest.mark.parametrize(
  "case", cases.CASES, ids=lambda case: case.name
)
every_implementation = pytest.mark.parametrize(
  "implementation", IMPLEMENTATIONS
)


def attend(case, layout, implementation):
  """The function of a dict of arrays that returns out and lse."""

  def call(arrays):
    return block_sparse_attention(
      arrays["q"],
      arrays["k"],
      arrays["v"],
      layout,
      bias=arrays.get("bias"),
      sinks=arrays.get("sinks"),
      soft_cap=case.soft_cap,
      return_lse=True,
      implementation=implementation,
      precision="highest",
    )

  return call


@functools.partial(jax.jit, static_argnames=("implementation", "soft_cap"))
def run(arrays, layout, d_out, d_lse, *, implementation, soft_cap=None):
  """out and lse, and the gradients of all arrays; shared by the tests."""
  case = cases.Case("", soft_cap=soft_cap)
  result, pullback = jax.vjp(attend(case, layout, implementation), arrays)
  return result, pullback((d_out, d_lse))[0]


def skip_unless_supported(case, arrays, layout, implementation):
  """Skips with the implementation's own reason."""
  try:
    api.resolve_implementation(
      arrays["q"],
      arrays["k"],
      arrays["v"],
      layout,
      bias=arrays.get("bias"),
      soft_cap=case.soft_cap,
      implementation=implementation,
    )
  except NotImplementedError as error:
    pytest.skip(str(error))


def close(found, expected, dtype=np.float32):
  """Compares with a tolerance that follows the dtype and the size."""
  expected = np.asarray(expected, np.float64)
  finite = np.isfinite(expected)
  found = np.asarray(found, np.float64)
  np.testing.assert_array_equal(found[~finite], expected[~finite])
  size = max(1.0, np.max(np.abs(expected[finite]), initial=0))
  tolerance = {np.float32: 3e-5, jnp.bfloat16: 3e-2, np.float16: 4e-3}[dtype]
  np.testing.assert_allclose(
    found[finite], expected[finite], atol=tolerance * size, rtol=0
  )


@every_implementation
@every_case
def test_forward_and_gradients_follow_the_formulas(case, implementation):
  arrays = cases.inputs(case)
  mask, layout = cases.mask_and_layout(case)
  skip_unless_supported(case, arrays, layout, implementation)
  rng = np.random.default_rng(1)
  d_out = rng.normal(size=arrays["q"].shape[:3] + (case.v_width,))
  d_lse = rng.normal(size=(case.batch, case.heads, case.q_len))
  options = {
    "bias": arrays.get("bias"),
    "sinks": arrays.get("sinks"),
    "soft_cap": case.soft_cap,
  }
  out, lse = oracle.attention(
    arrays["q"], arrays["k"], arrays["v"], mask, **options
  )
  d_lse = np.where(np.isneginf(lse), 0, d_lse).astype(np.float32)
  (found_out, found_lse), found = run(
    arrays,
    layout,
    d_out.astype(np.float32),
    d_lse,
    implementation=implementation,
    soft_cap=case.soft_cap,
  )
  # Scores of 1e6 in float32 are off by 0.1: only their shape is tested there.
  rough = case.numbers == "huge"
  if not rough:
    close(found_out, out)
  close(found_lse, lse)
  empty = ~mask.any(-1) if not case.sinks else np.zeros(mask.shape[:3], bool)
  assert not np.any(np.swapaxes(np.asarray(found_out), 1, 2)[empty])
  expected = oracle.gradients(
    arrays["q"], arrays["k"], arrays["v"], mask, d_out, d_lse, **options
  )
  for name, gradient in found.items():
    assert np.isfinite(gradient).all()
    if not rough:
      close(gradient, expected[name])


# More query blocks than one bundle takes, and not a multiple of that.
_DRAWN = cases.Case(
  "drawn", batch=3, heads=4, q_len=70, k_len=53, block_q=8, block_k=8, bias=True
)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@hypothesis.given(
  kinds=arrays_of(np.int8, (3, 4, 9, 7), elements=st.integers(0, 2)),
  share=st.floats(0, 1),
  size=st.floats(1e-3, 4),
  hidden=st.floats(0, 1),
  seed=st.integers(0, 2**16),
)
@hypothesis.settings(max_examples=100)
def test_any_block_map(implementation, kinds, share, size, hidden, seed):
  """Hidden, partial and full blocks anywhere; each is of one compilation."""
  case, rng = _DRAWN, np.random.default_rng(seed)
  kinds = np.repeat(np.repeat(kinds, case.block_q, 2), case.block_k, 3)
  kinds = kinds[..., : case.q_len, : case.k_len]
  mask = (kinds == 2) | ((kinds == 1) & (rng.random(kinds.shape) < share))
  arrays = cases.inputs(case)
  arrays["q"] = arrays["q"] * np.float32(size)
  away = rng.random(arrays["bias"].shape) < hidden
  arrays["bias"] = np.where(away, -np.inf, arrays["bias"]).astype(np.float32)
  sizes = {"block_q": case.block_q, "block_k": case.block_k}
  layout = cases.jitted(layouts.from_mask, **sizes)(mask)
  d_out = rng.normal(size=arrays["q"].shape[:3] + (case.v_width,))
  qkv, bias = [arrays[name] for name in "qkv"], arrays["bias"]
  out, lse = oracle.attention(*qkv, mask, bias=bias)
  d_lse = np.where(np.isneginf(lse), 0, rng.normal(size=lse.shape))
  found, gradients = run(
    arrays,
    layout,
    d_out.astype(np.float32),
    d_lse.astype(np.float32),
    implementation=implementation,
  )
  close(found[0], out)
  close(found[1], lse)
  expected = oracle.gradients(*qkv, mask, d_out, d_lse, bias=bias)
  for name, gradient in gradients.items():
    close(gradient, expected[name])


@every_implementation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["large_random"])
def test_half_precision(name, dtype, implementation):
  case = BY_NAME[name]
  arrays = cases.inputs(case, dtype)
  mask, layout = cases.mask_and_layout(case)
  skip_unless_supported(case, arrays, layout, implementation)
  (out, lse), found = run(
    arrays,
    layout,
    np.ones(arrays["q"].shape[:3] + (case.v_width,), dtype),
    np.zeros(arrays["q"].shape[:1] + (case.heads, case.q_len), np.float32),
    implementation=implementation,
  )
  assert out.dtype == dtype
  assert lse.dtype == np.float32
  options = {"bias": arrays.get("bias")}
  exact = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
  want = oracle.attention(exact["q"], exact["k"], exact["v"], mask, **options)
  close(out, want[0], dtype)
  close(lse, want[1], dtype)
  ones = np.ones(want[0].shape)
  expected = oracle.gradients(
    exact["q"],
    exact["k"],
    exact["v"],
    mask,
    ones,
    np.zeros(want[1].shape),
    **options,
  )
  for key, gradient in found.items():
    assert gradient.dtype == arrays[key].dtype
    close(gradient, expected[key], dtype)


@every_implementation
@pytest.mark.parametrize(
  "name", ["random_mask", "union_of_layouts", "large_random"]
)
def test_order_and_unused_entries_of_lists_do_not_matter(name, implementation):
  case = BY_NAME[name]
  arrays = cases.inputs(case)
  _, layout = cases.mask_and_layout(case)
  skip_unless_supported(case, arrays, layout, implementation)
  rng = np.random.default_rng(0)

  def shuffled(layout):
    """Permutes each list, and fills its unused end with random blocks."""
    changes = {}
    for kind in ("full", "partial"):
      count = np.asarray(getattr(layout, kind + "_count"))
      index = np.array(getattr(layout, kind + "_index"))
      order = np.broadcast_to(np.arange(index.shape[-1]), index.shape).copy()
      for at in np.ndindex(count.shape):
        order[at][: count[at]] = rng.permutation(count[at])
      index = np.take_along_axis(index, order, -1)
      free = np.arange(index.shape[-1]) >= count[..., None]
      noise = rng.integers(layout.k_blocks, size=index.shape)
      changes[kind + "_index"] = jnp.asarray(
        np.where(free, noise, index).astype(np.int32)
      )
    if layout.partial_tag is not None:
      changes["partial_tag"] = jnp.take_along_axis(
        layout.partial_tag, jnp.asarray(order), -1
      )
    if layout.partial_mask is not None:
      changes["partial_mask"] = jnp.take_along_axis(
        layout.partial_mask, jnp.asarray(order)[..., None, None], -3
      )
    return dataclasses.replace(layout, transpose=None, **changes)

  both = functools.partial(
    run,
    arrays,
    d_out=np.ones(arrays["q"].shape[:3] + (case.v_width,), np.float32),
    d_lse=np.ones((case.batch, case.heads, case.q_len), np.float32),
    implementation=implementation,
  )
  expected, found = both(layout), both(shuffled(layout))
  jax.tree.map(close, found, expected)


@every_implementation
def test_vmap_is_a_loop_and_jit_is_eager(implementation):
  case = BY_NAME["grouped"]
  arrays = cases.inputs(case)
  mask = np.random.default_rng(0).random((2, 1, 6, 48, 48)) < 0.3
  make = lambda mask: layouts.from_mask(mask, block_q=16, block_k=16)
  skip_unless_supported(case, arrays, jax.jit(make)(mask[0]), implementation)

  @jax.jit
  def gradient(mask, arrays):
    call = attend(case, make(mask), implementation)
    return jax.grad(lambda a: jnp.sum(call(a)[0] ** 2))(arrays)

  one = jax.tree.map(lambda x: x[0], arrays)
  looped = [[gradient(m, one) for m in row] for row in mask]
  twice = jax.jit(jax.vmap(jax.vmap(gradient, (0, None)), (0, None)))(mask, one)
  for i, row in enumerate(looped):
    for j, expected in enumerate(row):
      picked = jax.tree.map(lambda x, i=i, j=j: x[i, j], twice)
      jax.tree.map(close, picked, expected)
  if implementation == "xla":  # One operation at a time takes long.
    eager = attend(case, jax.jit(make)(mask[0, 0]), implementation)(one)
    again = jax.jit(lambda m: attend(case, make(m), implementation)(one))
    jax.tree.map(close, again(mask[0, 0]), eager)


@every_implementation
def test_padding_of_the_sequence_does_not_leak(implementation):
  rng = np.random.default_rng(0)
  draw = lambda n: rng.normal(size=(1, n, 2, 16)).astype(np.float32)
  q, k, v = draw(40), draw(40), draw(40)
  call = jax.jit(
    functools.partial(block_sparse_attention, implementation=implementation)
  )
  short = layouts.full(q_len=40, block_q=16, block_k=16)
  ids = (np.arange(70) >= 40).astype(np.int32)[None]
  build = functools.partial(layouts.from_segments, block_q=16, block_k=16)
  long = jax.jit(build)(ids)
  case = cases.Case("")
  for layout, n in ((short, 40), (long, 70)):
    skip_unless_supported(
      case, dict.fromkeys("qkv", draw(n)), layout, implementation
    )
  widened = [np.concatenate([x, 100 * draw(30)], 1) for x in (q, k, v)]
  close(call(*widened, long)[:, :40], call(q, k, v, short))


def test_segment_ids_restrict_any_layout():
  case = BY_NAME["grouped"]
  arrays = cases.inputs(case)
  mask, layout = cases.mask_and_layout(case)
  ids = np.sort(np.random.default_rng(0).integers(4, size=(2, 48)), axis=1)
  both = mask & (ids[:, None, :, None] == ids[:, None, None, :])
  out = jax.jit(block_sparse_attention)(
    arrays["q"],
    arrays["k"],
    arrays["v"],
    layout,
    q_segment_ids=ids,
    k_segment_ids=ids,
  )
  close(out, oracle.attention(arrays["q"], arrays["k"], arrays["v"], both)[0])


def test_the_oracle_agrees_with_finite_differences():
  case = BY_NAME["sinks_and_cap"]
  arrays = {n: x.astype(np.float64) for n, x in cases.inputs(case).items()}
  mask, _ = cases.mask_and_layout(case)
  rng = np.random.default_rng(3)
  d_out = rng.normal(size=arrays["v"].shape)
  d_lse = rng.normal(size=(case.batch, case.heads, case.q_len))

  def value(arrays):
    out, lse = oracle.attention(**arrays, mask=mask, soft_cap=case.soft_cap)
    return np.sum(out * d_out) + np.sum(lse * d_lse)

  gradients = oracle.gradients(
    **arrays, mask=mask, d_out=d_out, d_lse=d_lse, soft_cap=case.soft_cap
  )
  for name, x in arrays.items():
    step = 1e-5 * rng.normal(size=x.shape)
    change = (
      value(arrays | {name: x + step}) - value(arrays | {name: x - step})
    ) / 2
    assert change == pytest.approx(np.sum(gradients[name] * step), rel=1e-5)


def test_the_choice_can_be_asked_and_wrong_ones_raise():
  case = BY_NAME["causal"]
  arrays = cases.inputs(case)
  layout = cases.mask_and_layout(case)[1]
  q, k, v = arrays["q"], arrays["k"], arrays["v"]
  assert api.resolve_implementation(q, k, v, layout) == "xla"
  with pytest.raises(ValueError, match="allowed: None.*'xla'"):
    block_sparse_attention(q, k, v, layout, implementation="cuda")
  with pytest.raises(ValueError, match="layout is for q_len=48"):
    block_sparse_attention(q[:, :40], k, v, layout)
  with pytest.raises(ValueError, match="dtypes"):
    block_sparse_attention(q.astype(np.float16), k, v, layout)
  with pytest.raises(ValueError, match="do not divide"):
    block_sparse_attention(q[:, :, :1], k, v, layout)
  ids = np.zeros((3, 48), np.int32)
  wrong = jax.jit(
    functools.partial(layouts.from_segments, block_q=16, block_k=16)
  )(ids)
  with pytest.raises(ValueError, match="leading axes"):
    block_sparse_attention(q, k, v, wrong)


def test_an_implementation_that_cannot_run_raises(monkeypatch):
  never = contract.Implementation(
    "never", None, None, supports=lambda *_: "q: float32 given, none allowed"
  )
  known = dict(registry.implementations()) | {"never": never}
  monkeypatch.setattr(registry, "implementations", lambda: known)
  case = BY_NAME["causal"]
  arrays = cases.inputs(case)
  with pytest.raises(NotImplementedError, match="none allowed"):
    attend(case, cases.mask_and_layout(case)[1], "never")(arrays)


# Every size with every case, and both on every platform.
@pytest.mark.parametrize(
  ("name", "cells", "platform"),
  [
    (name, cells, ("cpu", "gpu")[(i + j) % 2])
    for i, name in enumerate(["random_mask", "grouped", "ragged"])
    for j, cells in enumerate([1, 3, 5, 100])
  ],
)
def test_bundles_of_any_size_agree(name, cells, platform, monkeypatch):
  """Also where they do not divide the cells and one has to be filled up.

  The program for a GPU, which scatters results, is run here, on a CPU.
  """
  case = BY_NAME[name]
  arrays = cases.inputs(case)
  _, layout = cases.mask_and_layout(case)
  d_out = np.ones(arrays["q"].shape[:3] + (case.v_width,), np.float32)
  d_lse = np.ones((case.batch, case.heads, case.q_len), np.float32)
  expected = run(arrays, layout, d_out, d_lse, implementation="reference")
  for rows in ("_CPU_ROWS", "_ROWS"):
    monkeypatch.setattr(blocks, rows, cells * case.block_q)
  traced_anew = jax.jit(
    functools.partial(run.__wrapped__, implementation="xla")
  )
  with aot.compiling_for(platform):
    found = traced_anew(arrays, layout, d_out, d_lse)
  jax.tree.map(close, found, expected)


@pytest.mark.parametrize("implementation", ["xla"])
def test_work_and_memory_follow_the_lists(implementation):
  """Neither pass holds anything of the size of the attention matrix."""
  n = 8192
  layout = layouts.from_pattern(layouts.Causal() & layouts.Window(256), q_len=n)
  shape = jax.ShapeDtypeStruct((1, n, 1, 64), np.float32)
  call = lambda q, k, v: jnp.sum(
    block_sparse_attention(q, k, v, layout, implementation=implementation)
  )
  compiled = (
    jax.jit(jax.grad(call, (0, 1, 2))).lower(shape, shape, shape).compile()
  )
  inputs = 3 * n * 64 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * inputs
