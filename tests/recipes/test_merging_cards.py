"""The worked examples of the cards of merging recipes."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.recipes import reference_merging as reference
from tests.recipes.sites_merging import batch_of, reduce_once
from tests.recipes.sites_pruning import rows
from tokjax import budgets, recipes, scores
from tokjax.attention import dense
from tokjax.models.reducer import merge_map

KEYS = np.array([[1, 0], [0, 1], [0.8, 0.6], [1, 0.1]], np.float32)
SCALARS = np.array([10, 20, 30, 40], np.float32)


def circle(*degrees):
  angle = np.deg2rad(degrees)
  return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


@pytest.mark.parametrize(
  ("keep", "x", "size", "back"),
  [
    (3, (30, 20, 25), (1, 1, 2), (25, 20, 30, 25)),
    (2, (20, 80 / 3), (1, 3), (80 / 3, 20, 80 / 3, 80 / 3)),
  ],
)
def test_tome(keep, x, size, back):
  similar = reference.cosines(KEYS)[0::2, 1::2]
  np.testing.assert_allclose(similar, [[0, 0.9950], [0.6, 0.8557]], atol=5e-5)
  result = reduce_once(
    "tome", batch_of(SCALARS[None, :, None]), keep, keys=KEYS[None, None]
  )
  np.testing.assert_allclose(result.tokens.x[0, :, 0], x, rtol=1e-6)
  np.testing.assert_array_equal(result.tokens.size[0], size)
  np.testing.assert_allclose(result.restored[0, :, 0], back, rtol=1e-6)


def test_merging_equal_keys_and_values_changes_no_other_attention():
  k, v = rows(0, 1, 2, 5, 4), rows(1, 1, 2, 5, 4)
  k[:, :, 3], v[:, :, 3] = k[:, :, 1], v[:, :, 1]
  bias = jnp.log(jnp.array([[1.0, 3.0, 1.0, 2.0, 4.0]]))
  merged = jnp.log(jnp.array([[1.0, 5.0, 1.0, 4.0]]))
  k, v, few = jnp.asarray(k), jnp.asarray(v), jnp.array([0, 1, 2, 4])
  before = dense.Dense()(k[:, :, few], k, v, bias=bias)
  after = dense.Dense()(k[:, :, few], k[:, :, few], v[:, :, few], bias=merged)
  np.testing.assert_allclose(before, after, atol=1e-6)


def test_tome_merges_half_at_most_and_says_so():
  for tokens, r in ((196, 98), (195, 97)):
    slots = recipes.get("tome", budget=budgets.Removals((r,)))
    assert slots.counts(tokens, 1) == ((tokens - r,),)
    slots = recipes.get("tome", budget=budgets.Removals((r + 1,)))
    with pytest.raises(budgets.BudgetError, match="tome: block 0"):
      slots.counts(tokens, 1)


def test_tomesd():
  x = np.append(rows(0, 1, 16, 4), np.full((1, 16, 1), 7.0), axis=-1)
  result = reduce_once(
    "tomesd", batch_of(x), 8, grid=(4, 4), options={"random": False}
  )
  assert result.tokens.num_tokens == 8
  np.testing.assert_array_equal(result.plan.anchor[0, -4:], [0, 2, 8, 10])
  np.testing.assert_allclose(result.tokens.x[0, :, 4], 7, rtol=1e-6)
  assert result.restored.shape == (1, 16, 5)
  np.testing.assert_allclose(result.restored[0, :, 4], 7, rtol=1e-6)


def test_tomesd_with_ratio_zero_is_the_identity():
  x = rows(0, 1, 16, 4)
  result = reduce_once(
    "tomesd", batch_of(x), 16, grid=(4, 4), options={"random": False}
  )
  assert sorted(map(tuple, result.tokens.x[0].tolist())) == sorted(
    map(tuple, x[0].tolist())
  )


def test_pitome():
  keys = circle(0, 10, 20, 120, 200, 300)
  np.testing.assert_allclose(
    scores.energy(jnp.asarray(keys), 0.5),
    [0.0049, -0.0032, -0.0202, -0.3745, -0.4303, -0.1986],
    atol=5e-5,
  )
  x = np.arange(6, dtype=np.float32)[None, :, None]
  result = reduce_once(
    "pitome",
    batch_of(x),
    4,
    keys=keys[None, None],
    options={"margin": 0.5, "bsm_blocks": "none"},
  )
  np.testing.assert_allclose(result.tokens.x[0, :, 0], [3, 4, 1, 5], atol=1e-6)
  np.testing.assert_array_equal(result.tokens.size[0], [1, 1, 3, 1])


def test_mctf():
  mass, size = np.float32([0.4, 0.1, 0.2, 0.3]), np.float32([2, 1, 1, 1])
  weights = reference.mctf_weights(KEYS, mass, size, (1, 20, 40))
  np.testing.assert_allclose(
    weights[0::2, 1::2], [[0.4585, 0.8658], [0.7727, 0.8484]], atol=5e-5
  )
  result = reduce_once(
    "mctf",
    batch_of(KEYS[None], size=size[None]),
    3,
    attention=np.ones((1, 1, 4, 4), np.float32) / 4,
    received_attention=mass[None, None],
  )
  assert result.groups(0) == [{0, 3}, {2}, {1}]
  np.testing.assert_array_equal(result.tokens.size[0], [3, 1, 1])
  np.testing.assert_allclose(
    result.matrix[0] @ SCALARS, [20 / 1.1, 30, 20], rtol=1e-5
  )
  attention = np.exp(rows(0, 1, 1, 4, 4))
  attention /= attention.sum(-1, keepdims=True)
  merged = merge_map(result.plan, jnp.asarray(attention))[0, 0]
  np.testing.assert_allclose(merged.sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    merged,
    reference.merged_map(attention[0, 0], [[0, 3], [2], [1]], mass * size),
    rtol=1e-5,
  )
