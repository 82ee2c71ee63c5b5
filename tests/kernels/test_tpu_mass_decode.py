"""The TPU kernels of attention mass and decoding in Pallas's simulator."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import decode_attention
from tests.kernels import cases, oracle
from tests.kernels.cases import large
from tests.kernels.test_attention_mass import check_sums


def test_mass_sums_and_gradients_follow_the_formulas_without_races(races):
  """Packed heads, ragged ends, lists that differ in length, a bias."""
  case = large(
    "mass",
    q_len=200,
    k_len=300,
    heads=2,
    groups=1,
    mask=cases.LOCAL,
    bias=True,
  )
  arrays = cases.inputs(case)
  mask, _ = cases.mask_and_layout(case)
  lse = oracle.probabilities(
    arrays["q"], arrays["k"], mask, bias=arrays["bias"]
  )["lse"]
  check_sums(case, "tpu_races", lse.astype(np.float32))
  assert not races()


@pytest.mark.parametrize("listed", [False, True])
def test_decoding_follows_the_formulas_without_races(listed, races):
  """Ragged lengths, one empty cache, splits, bias, cap; heads first or last."""
  rng = np.random.default_rng(0)
  batch, t, heads, groups, n, d = 3, 2, 4, 2, 512, 128
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k = draw(batch, t, heads, d), draw(batch, n, groups, d)
  v, bias = draw(batch, n, groups, d), draw(batch, heads, n)
  lengths = np.array([512, 200, 0])
  shown, where = np.ones((batch, groups, n), bool), {}
  if listed:
    blocks = np.stack(
      [[rng.permutation(4)[:3] for _ in range(groups)] for _ in range(batch)]
    )
    counts = np.array([[3, 2], [1, 3], [2, 0]])
    where = {"blocks": blocks, "counts": counts}
    shown[:] = False
    for b, g in np.ndindex(batch, groups):
      for j in blocks[b, g][: counts[b, g]]:
        shown[b, g, 128 * j : 128 * (j + 1)] = True
  end = lengths[:, None] - np.arange(t - 1, -1, -1)
  mask = (np.arange(n) < end[..., None])[:, None]
  mask = mask & np.repeat(shown, 2, 1)[:, :, None]
  expected = oracle.attention(q, k, v, mask, bias=bias, soft_cap=5.0)
  run = functools.partial(
    decode_attention,
    causal=True,
    soft_cap=5.0,
    splits=2,
    return_lse=True,
    heads_first=listed,
    implementation="tpu_races",
  )
  if listed:
    k, v = (np.swapaxes(x, 1, 2) for x in (k, v))
  found = jax.jit(run)(q, k, v, lengths=lengths, bias=bias, **where)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert not races()
