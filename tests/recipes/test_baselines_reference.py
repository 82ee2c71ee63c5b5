"""Baselines keep exactly what their one-line definitions say."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recipes.sites_pruning import WIDTH, rows, stage_of, tokens_of
from tokjax import budgets, recipes, scores, selection
from tokjax.plan import move_batch
from tokjax.recipes.vision.baselines import Downsample
from tokjax.reduce.site import Site
from tokjax.signals import Answers
from tokjax.slots import Slots


def patches(plan, example=0):
  anchor = np.asarray(plan.anchor[example])
  assert anchor[0] == 0
  return list(anchor[1:] - 1)


def test_none_is_the_model():
  assert recipes.get("none") == Slots(name="none")


def test_random_draws_exact_counts_without_replacement():
  stage = stage_of("random", 16, 1, budget=budgets.Once(0.375, 1))
  examples = 2000
  keys = jax.random.split(jax.random.key(0), examples)
  plan, _ = jax.jit(lambda t, k: stage.plan(t, Answers(), keys=k))(
    tokens_of(np.zeros((examples, 17, 1), np.float32)), keys
  )
  kept = np.asarray(plan.anchor)
  assert np.all(kept[:, 0] == 0)
  assert np.all(np.diff(kept, axis=1) > 0)
  assert kept.shape == (examples, 1 + 6)
  assert len({tuple(k) for k in kept}) > examples / 2
  often = np.bincount(kept[:, 1:].ravel() - 1, minlength=16) / examples
  # Six standard deviations of a binomial share.
  np.testing.assert_allclose(often, 6 / 16, atol=6 * (0.24 / examples) ** 0.5)
  again = np.asarray(jax.jit(scores.random, static_argnums=1)(keys[0], 16))
  assert np.all((again >= 0) & (again < 1))


def test_random_draws_anew_in_every_block():
  tokens = tokens_of(rows(0, 1, 33, WIDTH))
  keys = jax.random.split(jax.random.key(1), 1)
  sets = set()
  for layer in (1, 2):
    stage = stage_of("random", 32, layer, budget=budgets.Once(0.5, layer))
    plan, _ = stage.plan(tokens, Answers(), keys=keys)
    sets.add(tuple(patches(plan)))
  assert len(sets) == 2


def test_stride_is_the_floor_of_linspace():
  for n in (1, 2, 3, 8, 13, 31):
    for k in range(1, n + 1):
      index, valid = selection.stride(n, k)
      steps = [Fraction(i * (n - 1), max(k - 1, 1)) for i in range(k)]
      assert list(map(int, index)) == [int(s) for s in steps]
      assert valid is None


def test_stride_over_the_real_tokens():
  stride = jax.jit(
    lambda mask, count: selection.stride(9, 5, mask=mask, count=count)
  )
  mask = jnp.array([0, 1, 1, 0, 1, 1, 0, 1, 1], bool)
  where = np.flatnonzero(mask)
  for count in range(1, 6):
    index, valid = stride(mask, jnp.array(count))
    expected = [where[i * 5 // max(count - 1, 1)] for i in range(count)]
    assert list(index[valid]) == expected
    assert len(set(map(int, index))) == 5
  index, valid = stride(jnp.zeros((9,), bool), jnp.array(0))
  assert not np.any(valid)
  assert len(set(map(int, index))) == 5


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (3, 6)])
def test_center_keeps_the_nearest_to_the_middle(grid):
  h, w = grid
  place = np.stack(np.divmod(np.arange(h * w), w), -1).astype(np.float32)
  far = [(r - (h - 1) / 2) ** 2 + (c - (w - 1) / 2) ** 2 for r, c in place]
  np.testing.assert_array_equal(
    scores.centrality(jnp.asarray(place)), -np.array(far)
  )
  n = h * w
  tokens = tokens_of(rows(0, 1, 1 + n, WIDTH))
  tokens = tokens.replace(position=tokens.position.at[0, 1:].set(place))
  stage = stage_of("center", n, 0)
  expected = sorted(range(n), key=lambda j: (far[j], j))[: stage.keep]
  plan, _ = stage.plan(tokens, Answers())
  assert patches(plan) == sorted(expected)


def test_the_middle_is_that_of_the_real_tokens():
  place = jnp.array([[0.0, 0], [0, 1], [0, 2], [5, 5]])
  mask = jnp.array([True, True, True, False])
  far = scores.centrality(place, mask=mask)
  np.testing.assert_array_equal(far[:3], [-1, 0, -1])


def test_avgpool_averages_cells():
  (reduce,) = recipes.get("avgpool", keep=0.25).reduce
  x = rows(0, 36, 4)
  site = Site(
    tokens_of(x[None]),
    Answers(),
    reduce.budget.counts(36, 1)[0],
    grid=(6, 6),
  )
  plan = reduce.rule(site)
  expected = x.reshape(3, 2, 3, 2, 4).mean(axis=(1, 3)).reshape(9, 4)
  np.testing.assert_allclose(plan.apply(jnp.asarray(x)), expected, atol=1e-6)
  np.testing.assert_allclose(plan.total(jnp.ones((36,))), 4.0)


@pytest.mark.parametrize(
  ("keep", "side"), [(1.0, 32), (0.5, 24), (0.25, 16), (0.01, 4)]
)
def test_downsample_shrinks_the_image_to_whole_patches(keep, side):
  program = recipes.get("downsample", keep=keep).program
  assert program == Downsample(keep)
  images = jnp.asarray(rows(0, 2, 32, 32, 3))
  out = program(lambda x: x, images, 4)
  assert out.shape == (2, side, side, 3)
  if keep == 1.0:
    np.testing.assert_array_equal(out, images)
  flat = program(lambda x: x, jnp.full_like(images, 3.0), 4)
  np.testing.assert_allclose(flat, 3.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["random", "stride", "center"])
def test_baselines_only_drop(name):
  tokens = tokens_of(rows(1, 2, 17, WIDTH))
  keys = jax.random.split(jax.random.key(0), 2)
  stage = stage_of(name, 16, 1, budget=budgets.Once(0.5, 1))
  plan, _ = stage.plan(tokens, Answers(), keys=keys)
  out = move_batch(plan, tokens)
  assert out.x.shape == (2, 9, WIDTH)
  for e in range(2):
    np.testing.assert_array_equal(out.x[e], tokens.x[e][plan.anchor[e]])
    np.testing.assert_array_equal(
      out.position[e], tokens.position[e][plan.anchor[e]]
    )
  np.testing.assert_array_equal(out.size, 1.0)
