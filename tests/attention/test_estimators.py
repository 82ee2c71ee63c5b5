"""Block estimators against NumPy, and what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout as layouts
from tests.attention.estimators_reference import reference
from tokjax.attention import estimators
from tokjax.binding import bind

H, G, M, D = 4, 2, 22, 8
SIZES = {"block_q": 8, "block_k": 4}
OPTIONS = {
  "antidiagonal": {"stride": 2},
  "bound": {},
  "landmark": {},
  "last_query": {"rows": 5},
  "lse_cached": {},
  "mean_pooled": {},
  "sampled": {"samples": 3},
}
BOUND = {
  name: bind(getattr(estimators, name), **options)
  for name, options in OPTIONS.items()
}
every_estimator = pytest.mark.parametrize("name", OPTIONS)


def inputs(n, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return 2 * draw(H, M, D), draw(G, n, D), draw(n)


def all_of_them(pattern):
  """One compilation for all estimators."""

  @jax.jit
  def run(q, k, bias=None, q_mask=None, k_mask=None):
    return {
      name: estimator(
        estimators.Blocked(
          q=q, k=k, bias=bias, q_mask=q_mask, k_mask=k_mask, pattern=pattern,
          **SIZES,
        )  # fmt: skip
      )
      for name, estimator in BOUND.items()
    }

  return run


@pytest.fixture(scope="module")
def everything():
  """No masks, no bias, more keys than queries."""
  q, k, _ = inputs(27)
  found = all_of_them(layouts.Full())(q, k)
  given = {
    "q": q, "k": k, "bias": np.zeros(27), "q_mask": np.ones(M, bool),
    "k_mask": np.ones(27, bool), "sees": lambda i, j: True,
  }  # fmt: skip
  return found, given


@pytest.fixture(scope="module")
def causal():
  """A causal pattern, a bias, and tokens that are padding here and there."""
  q, k, bias = inputs(M, 1)
  mask = np.ones(M, bool)
  # One block of keys and the end are hidden, and single ones.
  mask[[1, 4, 5, 6, 7, 13, 19, 20, 21]] = False
  run = all_of_them(layouts.Causal())
  found = run(q, k, bias, mask, mask)
  given = {
    "q": q, "k": k, "bias": bias, "q_mask": mask, "k_mask": mask,
    "sees": lambda i, j: j <= i,
  }  # fmt: skip
  return found, given, run


@every_estimator
@pytest.mark.parametrize("setting", ["everything", "causal"])
def test_it_is_what_the_formula_says(name, setting, request):
  found, given, *_ = request.getfixturevalue(setting)
  expected = reference(name, **SIZES, **OPTIONS[name], **given)
  np.testing.assert_allclose(
    np.exp(found[name]), expected, rtol=2e-4, atol=1e-6
  )


@every_estimator
def test_padding_does_not_leak(name, causal):
  found, given, run = causal
  junk = lambda x, axis: np.where(
    np.expand_dims(given["q_mask"], axis), x, np.float32(1e3)
  )
  spoilt = run(
    junk(given["q"], (0, 2)), junk(given["k"], (0, 2)),
    junk(given["bias"], ()), given["q_mask"], given["k_mask"],
  )  # fmt: skip
  np.testing.assert_array_equal(spoilt[name], found[name])


def test_the_bound_bounds_and_the_exact_mass_is_whole(everything):
  found, given = everything
  k = np.repeat(given["k"], H // G, 0)
  logits = np.einsum("hid,hjd->hij", given["q"], k) / np.sqrt(D)
  for i, j in np.ndindex(3, 7):
    block = logits[:, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4]
    assert (found["bound"][:, i, j] >= block.max((1, 2)) - 1e-5).all()
  rows = np.exp(found["lse_cached"]).sum(-1)
  np.testing.assert_allclose(rows, [[8, 8, 6]] * H, rtol=1e-5)


def test_a_cached_lse_is_used():
  q, k, _ = inputs(M)
  run = jax.jit(
    lambda lse: estimators.lse_cached(
      estimators.Blocked(q=jnp.asarray(q), k=jnp.asarray(k), **SIZES), lse=lse
    )
  )
  logits = np.einsum("hid,hjd->hij", q, np.repeat(k, 2, 0)) / np.sqrt(D)
  lse = np.log(np.exp(logits).sum(-1))
  exact, shifted = run(lse), run(lse + 1)
  np.testing.assert_allclose(shifted, exact - 1, rtol=1e-4, atol=1e-4)


def test_shares_sum_to_one_where_anything_is_seen():
  estimate = jnp.array([[[0.0, 1.0, -jnp.inf], [2.0, 3.0, 4.0]]])
  visible = jnp.array([[[True, True, True], [False, False, False]]])
  found = estimators.share(estimate, visible)
  np.testing.assert_allclose(found.sum(-1), [[1.0, 0.0]], rtol=1e-6)


def test_wrong_options_are_named():
  q, k, _ = map(jnp.asarray, inputs(M))
  given = estimators.Blocked(q=q, k=k, **SIZES)
  with pytest.raises(ValueError, match="stride=3: must divide block_q=8"):
    estimators.antidiagonal(given, stride=3)
  with pytest.raises(ValueError, match="samples=9: must lie in 1..block_q=8"):
    estimators.sampled(given, samples=9)
