"""Column sums, block sums and chosen rows of the softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot
from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import (
  attention_mass,
  attention_rows,
  block_mass,
  masses,
)
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.walks import blocks
from tests.kernels import cases, oracle

NAMES = (
  "random_mask",
  "grouped",
  "ragged",
  "all_hidden",
  "tiny",
  "segments",
  "hidden_by_bias",
)
CHOSEN = [case for case in cases.CASES if case.name in NAMES]
every_case = pytest.mark.parametrize("case", CHOSEN, ids=lambda c: c.name)
every_implementation = pytest.mark.parametrize(
  "implementation", ["xla", "reference"]
)


def setting(case, dtype=np.float32):
  """Arrays, layout, weights, and the exact probabilities."""
  arrays = {
    name: np.asarray(x, np.float32)
    for name, x in cases.inputs(case, dtype).items()
  }
  mask, layout = cases.mask_and_layout(case)
  rng = np.random.default_rng(0)
  weights = rng.random((case.batch, case.heads, case.q_len)).astype(np.float32)
  p = oracle.probabilities(
    arrays["q"], arrays["k"], mask, bias=arrays.get("bias")
  )["p"]
  return arrays, layout, weights, p


@functools.partial(jax.jit, static_argnames="implementation")
def sums_and_gradients(arrays, layout, weights, g, implementation, lse=None):
  """Both sums, and gradients of the weighted ones."""

  def both(arrays, weights):
    return masses(
      arrays["q"], arrays["k"], layout=layout, weights=weights, lse=lse,
      bias=arrays.get("bias"), implementation=implementation,
      precision="highest",
    )  # fmt: skip

  value, pullback = jax.vjp(both, arrays, weights)
  return value, pullback(g)


def by_blocks(x, case):
  """Sums over blocks, `[b, H, q blocks, k blocks]`."""
  pad = ((0, 0), (0, 0)) + tuple(
    (0, -n % size)
    for n, size in ((case.q_len, case.block_q), (case.k_len, case.block_k))
  )
  x = np.pad(x, pad)
  shape = (x.shape[2] // case.block_q, case.block_q, -1, case.block_k)
  return x.reshape(*x.shape[:2], *shape).sum((3, 5))


def check_sums(case, implementation, lse=None, dtype=np.float32):
  """Sums and gradients against the formulas in float64."""
  arrays, layout, weights, p = setting(case, dtype)
  arrays = {n: x for n, x in arrays.items() if n in ("q", "k", "bias")}
  given = arrays | {n: jnp.asarray(arrays[n], dtype) for n in "qk"}
  # Gradients of scores are rounded before the last product.
  near = 1e-4 if dtype == np.float32 else 1e-2
  rng = np.random.default_rng(1)
  g_columns = rng.normal(size=p.sum(2).shape).astype(np.float32)
  g_blocks = rng.normal(size=by_blocks(p, case).shape).astype(np.float32)
  (columns, blocks), (found, d_weights) = sums_and_gradients(
    given, layout, weights, (g_columns, g_blocks), implementation, lse
  )
  weighted = p * weights[..., None]
  np.testing.assert_allclose(columns, weighted.sum(2), atol=3e-5)
  np.testing.assert_allclose(blocks, by_blocks(weighted, case), atol=3e-5)
  wide = np.repeat(np.repeat(g_blocks, case.block_q, 2), case.block_k, 3)
  g = g_columns[:, :, None, :] + wide[..., : case.q_len, : case.k_len]
  pg = p * g
  np.testing.assert_allclose(d_weights, pg.sum(-1), atol=1e-4)
  # A given lse does not move with the scores.
  moving = 0 if lse is not None else p * pg.sum(-1, keepdims=True)
  d_logits = weights[..., None] * (pg - moving)
  if "bias" in found:
    np.testing.assert_allclose(found["bias"], d_logits.sum(2), atol=1e-4)
  times = case.heads // case.groups
  d_s = d_logits * case.width**-0.5
  d_q = np.einsum("bhij,bjhd->bihd", d_s, np.repeat(arrays["k"], times, 2))
  size = 1 + np.abs(d_q).max()
  np.testing.assert_allclose(_wide(found["q"]), d_q, atol=near * size)
  d_k = np.einsum("bhij,bihd->bjhd", d_s, arrays["q"])
  d_k = d_k.reshape(d_k.shape[:2] + (case.groups, times, -1)).sum(3)
  size = 1 + np.abs(d_k).max()
  np.testing.assert_allclose(_wide(found["k"]), d_k, atol=near * size)


def _wide(x):
  return np.asarray(x, np.float32)


@every_implementation
@every_case
def test_sums_and_their_gradients(case, implementation):
  check_sums(case, implementation)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@every_case
def test_sums_with_bundles_that_do_not_divide_the_cells(
  case, platform, monkeypatch
):
  for rows in ("_CPU_ROWS", "_ROWS"):
    monkeypatch.setattr(blocks, rows, 5 * case.block_q)
  traced_anew = jax.jit(
    sums_and_gradients.__wrapped__, static_argnames="implementation"
  )
  monkeypatch.setitem(globals(), "sums_and_gradients", traced_anew)
  with aot.compiling_for(platform):
    check_sums(case, "xla")


def test_the_formulas_agree_with_finite_differences():
  """Of a loss that weighs both sums, in float64 NumPy."""
  case = CHOSEN[0]
  arrays, layout, weights, _ = setting(case)
  mask = cases.mask_and_layout(case)[0]
  rng = np.random.default_rng(2)
  g = rng.normal(size=(case.batch, case.heads, case.k_len))
  h = rng.normal(size=(case.batch, case.heads, 3, 3))

  def loss(q, k, bias):
    p = oracle.probabilities(q, k, mask, bias=bias)["p"] * weights[..., None]
    return np.sum(p.sum(2) * g) + np.sum(by_blocks(p, case) * h)

  given = {n: arrays[n] for n in ("q", "k", "bias")}
  _, (found, _) = sums_and_gradients(
    given, layout, weights, (g.astype(np.float32), h.astype(np.float32)), "xla"
  )
  exact = {n: x.astype(np.float64) for n, x in given.items()}
  for name, x in exact.items():
    step = 1e-4 * rng.normal(size=x.shape)
    change = loss(**exact | {name: x + step}) - loss(**exact | {name: x - step})
    slope = 2 * np.sum(np.asarray(found[name], np.float64) * step)
    assert slope == pytest.approx(change, rel=2e-3, abs=1e-6)


def test_a_known_lse_saves_a_pass_and_changes_nothing():
  case = CHOSEN[0]
  arrays, layout, _, p = setting(case)

  @jax.jit
  def run(q, k, bias):
    lse = block_sparse_attention(q, k, k, layout, bias=bias, return_lse=True)[1]
    options = dict(layout=layout, bias=bias, lse=lse)
    return attention_mass(q, k, **options), block_mass(q, k, **options)

  columns, blocks = run(arrays["q"], arrays["k"], arrays["bias"])
  np.testing.assert_allclose(columns, p.sum(2), atol=3e-5)
  np.testing.assert_allclose(blocks, by_blocks(p, case), atol=3e-5)


@jax.jit
def rows_and_gradient(arrays, rows, layout):
  """Rows, and the gradient of half the sum of their squares."""
  fn = lambda q: attention_rows(
    q, arrays["k"], rows, layout=layout, bias=arrays.get("bias")
  )
  found, pullback = jax.vjp(fn, arrays["q"])
  return found, pullback(found)[0]


@every_case
def test_chosen_rows(case):
  arrays, layout, _, p = setting(case)
  rows = np.array([case.q_len - 1, 0, case.q_len // 2])
  found, gradient = rows_and_gradient(arrays, rows, layout)
  np.testing.assert_allclose(found, p[:, :, rows], atol=3e-5)
  d_logits = p * (p - (p * p).sum(-1, keepdims=True)) * case.width**-0.5
  k = np.repeat(arrays["k"], case.heads // case.groups, 2)
  expected = np.zeros(gradient.shape)
  for r in rows:
    expected[:, r] += np.einsum("bhj,bjhd->bhd", d_logits[:, :, r], k)
  np.testing.assert_allclose(
    gradient, expected, atol=1e-4 * (1 + np.abs(expected).max())
  )


def test_everything_is_the_default_and_vmap_is_a_loop():
  case = next(c for c in CHOSEN if c.name == "grouped")
  arrays = cases.inputs(case)
  q, k = arrays["q"], arrays["k"]
  batched, looped = jax.jit(
    lambda q, k: (attention_mass(q, k), jax.vmap(attention_mass)(q, k))
  )(q, k)
  np.testing.assert_allclose(batched.sum(-1), case.q_len, rtol=1e-5)
  np.testing.assert_allclose(looped, batched, atol=1e-5)
  with pytest.raises(ValueError, match="allowed: None"):
    attention_mass(q, k, implementation="none")


def test_no_square_memory():
  n = 8192
  layout = layouts.full(q_len=n)
  shape = jax.ShapeDtypeStruct((1, n, 1, 64), np.float32)
  fn = lambda q, k: jnp.sum(attention_mass(q, k, layout=layout) ** 2)
  compiled = jax.jit(jax.grad(fn, (0, 1))).lower(shape, shape).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * n * 64 * 4
