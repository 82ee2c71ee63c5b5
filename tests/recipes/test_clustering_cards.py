"""The worked examples of the cards of clustering recipes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recipes import reference_clustering as reference
from tests.recipes.sites_merging import batch_of, reduce_once
from tests.recipes.sites_pruning import rows
from tokjax import matching, recipes
from tokjax.plan import Assignment

ARC = np.deg2rad(np.float32([0, 28, 60, 100]))
ARC = np.stack([np.cos(ARC), np.sin(ARC)], -1)


def column(*values):
  """One feature a token."""
  return jnp.array(values, jnp.float32)[:, None]


@pytest.mark.parametrize(
  ("linkage", "keep", "groups"),
  [
    ("single", 2, [{0, 1, 2}, {3}]),
    ("complete", 2, [{0, 1}, {2, 3}]),
    ("average", 2, [{0, 1}, {2, 3}]),
    ("average", 4, [{0}, {1}, {2}, {3}]),
    ("complete", 1, [{0, 1, 2, 3}]),
  ],
)
def test_atc(linkage, keep, groups):
  x = rows(0, 1, 4, 3)
  result = reduce_once(
    "atc",
    batch_of(x),
    keep,
    keys=ARC[None, None],
    options={"linkage": linkage},
  )
  assert result.groups(0) == groups
  if keep == 4:
    np.testing.assert_array_equal(result.tokens.x, x)
  if keep == 1:
    np.testing.assert_allclose(result.tokens.x[0, 0], x[0].mean(0), rtol=1e-5)


def test_dpc_knn():
  x = column(0, 1, 2, 10, 11, 12)
  result = reduce_once(
    "dpc_knn", batch_of(x[None]), 2, options={"neighbours": 3}
  )
  assert set(result.plan.anchor[0].tolist()) == {1, 4}
  assert sorted(result.tokens.x[0, :, 0].tolist()) == [1, 11]
  np.testing.assert_array_equal(result.tokens.size[0], [3, 3])


def test_dpc_knn_breaks_ties_by_noise_if_asked():
  x = column(0, 1, 2, 10, 11, 12)
  match = functools.partial(matching.dpc_knn, x, 2, neighbours=3)
  anchors = jax.jit(jax.vmap(lambda key: match(key=key).anchor))
  found = np.asarray(anchors(jax.random.split(jax.random.key(0), 16)))
  assert {tuple(a) for a in found.tolist()} == {(1, 4), (4, 1)}


def test_dpc_knn_follows_a_permutation():
  x, order = rows(1, 12, 3), np.random.default_rng(0).permutation(12)
  match = jax.jit(jax.vmap(lambda x: matching.dpc_knn(x, 4).anchor))
  anchor, moved = np.asarray(match(jnp.stack([x, x[order]])))
  np.testing.assert_array_equal(order[moved], anchor)


def test_keeping_all_clusters_permutes():
  x = jnp.asarray(rows(2, 6, 3))
  for match in (matching.dpc_knn, matching.kmedoids):
    plan = jax.jit(match, static_argnums=1)(x, 6)
    assert sorted(plan.anchor.tolist()) == list(range(6))
    assert not np.any(plan.dropped)


@pytest.mark.parametrize(
  ("cost", "medoids"), [("all", [2, 3]), ("members", [1, 3])]
)
def test_kmedoids(cost, medoids):
  # Without weights the seeds are 0 and what is farthest from it, 4.
  x = column(0, 1, 2, 10, 11)
  match = functools.partial(matching.kmedoids, cost=cost)
  plan = jax.jit(match, static_argnums=1)(x, 2)
  assert plan.anchor.tolist() == medoids


@pytest.mark.parametrize(
  ("tau", "centre"), [(1.0, (0.5, 10.5)), (0.01, (5.352, 5.648))]
)
def test_expedit_centres(tau, centre):
  x = column(0, 1, 10, 11)
  match = functools.partial(
    matching.local_soft_kmeans, grid=(1, 4), cells=(1, 2), temperature=tau
  )
  moved = jax.jit(lambda x: match(x).apply(x))(x)
  np.testing.assert_allclose(moved[:, 0], centre, atol=1e-3)


def test_expedit_reconstruction():
  x, centre = column(0, 1, 10, 11), column(0.5, 10.5)
  mix = functools.partial(matching.nearest_mix, x, centre, temperature=0.01)
  weights = mix(neighbours=2)
  np.testing.assert_allclose(weights[0], [0.9488, 0.3158], atol=5e-5)
  np.testing.assert_allclose(weights[0].sum(), 1.265, atol=5e-4)
  constant = mix(neighbours=2, normalise=True).sum(-1)
  np.testing.assert_allclose(constant, 1, rtol=1e-6)
  np.testing.assert_allclose(mix(neighbours=1), [[1, 0]] * 2 + [[0, 1]] * 2)


def test_expedit_mixes_all_centres_that_tie():
  weights = matching.nearest_mix(
    column(0), column(1, -1, 5), temperature=0.1, neighbours=1
  )
  np.testing.assert_allclose(weights, [[0.5**0.5, 0.5**0.5, 0]], rtol=1e-6)


def test_expedit_survives_centres_that_nobody_is_near_to():
  x = jnp.asarray(1e3 * rows(3, 16, 2))
  match = functools.partial(
    matching.local_soft_kmeans, grid=(4, 4), cells=(2, 2), temperature=1.0
  )
  moved = jax.jit(lambda x: match(x).apply(x))(x)
  assert np.all(np.isfinite(moved))


def soft(x, anchor, temperature):
  return matching.soft_assignment(
    jnp.asarray(x), jnp.asarray(anchor), temperature=temperature
  )


def test_token_transforming():
  x = rows(4, 8, 5)
  plan = soft(x, [6, 1, 3], 0.1)
  np.testing.assert_allclose(plan.matrix().sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(plan.share.sum(0), 1, rtol=1e-5)
  share = reference.token_transforming(x, [6, 1, 3], 0.1)
  np.testing.assert_allclose(plan.back, share.T, atol=1e-5)


def test_token_transforming_cold_merges_to_the_nearest_anchor():
  x = rows(5, 8, 5)
  similar = reference.cosines(x)[[6, 1, 3]]
  share = np.zeros((3, 8))
  share[similar.argmax(0), np.arange(8)] = 1
  plan = soft(x, [6, 1, 3], 1e-4)
  np.testing.assert_allclose(plan.share, share, atol=1e-6)
  np.testing.assert_allclose(
    plan.matrix(), share / share.sum(1, keepdims=True), atol=1e-6
  )
  whole = soft(x, np.arange(8), 1e-4)
  np.testing.assert_allclose(whole.matrix(), np.eye(8), atol=1e-6)


def test_token_transforming_has_pruning_and_merging_as_matrices():
  x, size = jnp.asarray(rows(6, 4, 3)), jnp.array([1.0, 2.0, 3.0, 1.0])
  prune = Assignment.select(jnp.array([2, 0]), 4)
  np.testing.assert_array_equal(prune.matrix(), [[0, 0, 1, 0], [1, 0, 0, 0]])
  merge = Assignment.from_parent(jnp.array([0, 0, 2, 2]), 2)
  source = merge.matrix()
  weight = source * size[None] / (source @ size)[:, None]
  merged = merge.weighted(size).apply(x)
  np.testing.assert_allclose(weight @ x, merged, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_relative_temperatures_do_not_see_the_scale_of_features(scale):
  """Squared distances times scale ** 2; what is shared stays."""
  x = jnp.asarray(rows(7, 24, 5))
  options = dict(grid=(4, 6), cells=(2, 3), temperature=10.0, relative=True)
  match = jax.jit(lambda x: matching.local_soft_kmeans(x, **options))
  one, other = match(x), match(scale * x)
  np.testing.assert_allclose(other.share, one.share, atol=2e-4)
  np.testing.assert_allclose(other.back, one.back, atol=2e-4)
  assert 0.5 < float(one.share.max(axis=0).mean()) < 0.99


@pytest.mark.parametrize("apart", [0.02, 0.2])
def test_relative_temperatures_do_not_see_how_alike_tokens_are(apart):
  """Cosines near one, as in the first blocks of encoders, and further apart."""
  noise = rows(8, 12, 64)
  x = jnp.asarray(apart * noise / 8 + np.eye(64)[0])
  share = matching.soft_assignment(
    x, jnp.arange(3), temperature=0.1, relative=True
  ).share
  # Not spread evenly, whatever the distance.
  assert 0.5 < float(share[:, 3:].max(axis=0).mean()) < 0.99


def test_equal_tokens_have_no_distance_to_be_relative_to():
  same = jnp.ones((8, 3))
  share = matching.soft_assignment(
    same, jnp.arange(2), temperature=0.1, relative=True
  ).share
  np.testing.assert_allclose(share, 0.5, atol=0.2)
  plan = matching.local_soft_kmeans(
    same, (2, 4), (1, 2), temperature=10.0, relative=True
  )
  assert np.isfinite(plan.share).all() and np.isfinite(plan.back).all()


@pytest.mark.parametrize(
  ("name", "published", "relative"),
  [("expedit", 0.02, "sharpness"), ("token_transforming", 0.05, "softness")],
)
def test_a_temperature_that_is_given_is_absolute(name, published, relative):
  rule = lambda **options: recipes.get(name, **options).reduce[0].rule
  options = dict(rule(temperature=published).options)
  assert options["temperature"] == published and not options["relative"]
  assert dict(rule(**{relative: 3.0}).options)["relative"]
  for wrong in ("temperature", relative):
    with pytest.raises(ValueError, match=f"{wrong}=-1.0: must be positive"):
      recipes.get(name, **{wrong: -1.0})
