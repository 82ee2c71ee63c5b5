"""TAP: its card and a NumPy reference (the loss: see test_losses)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.learned import models, reference
from tokjax import learned, recipes
from tokjax.learned import local_pooling
from tokjax.signals import Attention
from tokjax.slots import Slots

GRID = (9, 9)


def pooled(x, branches, grid=GRID):
  module = learned.TokenAwarePooling(branches)
  run = lambda x: module.init_with_output(
    jax.random.key(0), x, 1, grid, method="inputs"
  )
  return jax.jit(run)(x)


def features(seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(2, 82, 5)), jnp.float32)


def test_one_branch_changes_nothing():
  x = features()
  np.testing.assert_array_equal(pooled(x, 1)[0], x)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_windows_against_numpy(dilation):
  x = np.asarray(features()[:, 1:]).reshape(2, *GRID, 5)
  found = local_pooling.window_mean(jnp.asarray(x), dilation)
  for b in range(2):
    expected = reference.window_mean(x[b], dilation)
    np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-6)


def test_a_constant_image_changes_only_at_the_border():
  x = jnp.ones((1, 82, 5)) * 2.0
  out, _ = pooled(x, 4)
  inside = np.asarray(out[0, 1:]).reshape(*GRID, 5)
  np.testing.assert_allclose(inside[3:-3, 3:-3], 2.0, rtol=1e-6)
  assert (inside[0, 0] < 2.0).all(), "zeros come in at the border"


def test_the_mix_is_a_convex_one_of_the_branches():
  x = features(3)
  out, variables = pooled(x, 3)
  assert set(variables["params"]) == {"first", "second", "norm"}
  np.testing.assert_array_equal(out[:, 0], x[:, 0])
  patches = np.asarray(x[:, 1:]).reshape(2, *GRID, 5)
  branches = [patches] + [
    np.stack([reference.window_mean(p, i) for p in patches]) for i in (1, 2)
  ]
  found = np.asarray(out[:, 1:]).reshape(2, *GRID, 5)
  # One set of weights a token serves all of its features.
  for b, i, j in [(0, 0, 0), (0, 4, 4), (1, 8, 2)]:
    basis = np.stack([branch[b, i, j] for branch in branches], axis=1)
    weight, *_ = np.linalg.lstsq(basis, found[b, i, j], rcond=None)
    np.testing.assert_allclose(basis @ weight, found[b, i, j], atol=1e-5)
    np.testing.assert_allclose(weight.sum(), 1, atol=1e-4)
    assert (weight > 0).all()


def test_only_attention_sees_pooled_tokens():
  model = models.build("tap_adl", branches=3)
  params = models.init(model)
  _, out = models.apply(model, params, models.images())
  assert len(out["signals"]) == models.SMALL.depth
  attention = out["signals"][0].of(Attention)
  assert attention.shape == (3, 2, 17, 17)
  one = models.build(Slots(attend=learned.TokenAwarePooling(1)))
  same, _ = models.apply(one, models.init(one), models.images())
  plain, _ = models.apply(
    models.build(Slots()), models.init(one), models.images()
  )
  np.testing.assert_array_equal(same, plain)


def test_an_incomplete_grid_is_refused():
  with pytest.raises(ValueError, match="complete grid"):
    pooled(features(), 4, None)
  with pytest.raises(ValueError, match="branches=0"):
    recipes.get("tap_adl", branches=0)
