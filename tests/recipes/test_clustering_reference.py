"""Clustering recipes against slow references, and ATC against scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import AgglomerativeClustering

from tests.recipes import reference_clustering as reference
from tests.recipes import reference_merging as merging
from tests.recipes.sites_merging import batch_of, reduce_once, sizes
from tests.recipes.sites_pruning import rows
from tokjax import matching

B, H, WIDTH = 4, 2, 6


def shift(groups, protected):
  """Groups of patches as groups of tokens, protected ones first."""
  front = [[i] for i in range(protected)]
  return front + [[i + protected for i in g] for g in groups]


@pytest.mark.parametrize("linkage", ["single", "complete", "average"])
def test_atc(linkage):
  n, keep = 19, 5
  tokens = batch_of(rows(0, B, n, WIDTH), 1, sizes(0, B, n))
  keys = rows(1, B, H, n, WIDTH)
  result = reduce_once(
    "atc", tokens, keep, keys=keys, options={"linkage": linkage}
  )
  size = np.asarray(tokens.size)
  for e in range(B):
    metric = keys[e].mean(0)[1:]
    front, *groups = result.groups(e)
    assert front == {0}
    found = {frozenset(i - 1 for i in g) for g in groups}
    assert found == reference.agglomerative(metric, keep, linkage)
    labels = AgglomerativeClustering(
      keep, metric="precomputed", linkage=linkage
    ).fit_predict(1 - merging.cosines(metric))
    assert found == {
      frozenset(np.flatnonzero(labels == c)) for c in range(keep)
    }
    assert [min(g) for g in groups] == sorted(min(g) for g in groups)
    groups = [[0]] + [sorted(g) for g in groups]
    expected = merging.mean(groups, np.asarray(tokens.x[e]), size[e])
    np.testing.assert_allclose(result.tokens.x[e], expected, atol=1e-5)
    np.testing.assert_array_equal(
      result.tokens.size[e], merging.total(groups, size[e])
    )


@pytest.mark.parametrize("linkage", ["single", "complete", "average"])
def test_many_joins_agree_with_scikit_learn(linkage):
  x = jnp.asarray(rows(5, 90, 4))
  match = functools.partial(matching.agglomerative, linkage=linkage)
  plan = jax.jit(match, static_argnums=1)(x, 7)
  labels = AgglomerativeClustering(
    7, metric="precomputed", linkage=linkage
  ).fit_predict(1 - merging.cosines(np.asarray(x, np.float64)))
  pairs = set(
    zip(np.asarray(plan.index).tolist(), labels.tolist(), strict=True)
  )
  assert len(pairs) == 7


@pytest.mark.parametrize(("keep", "neighbours"), [(5, 5), (14, 3)])
def test_dpc_knn(keep, neighbours):
  n = 18
  tokens = batch_of(rows(2, B, n, WIDTH), 1)
  result = reduce_once(
    "dpc_knn", tokens, keep, options={"neighbours": neighbours}
  )
  for e in range(B):
    x = np.asarray(tokens.x[e], np.float64)
    groups = shift(reference.dpc_knn(x[1:], keep, neighbours), 1)
    assert result.groups(e) == [set(g) for g in groups]
    expected = merging.mean(groups, x, np.ones(n))
    np.testing.assert_allclose(result.tokens.x[e], expected, atol=1e-5)


@pytest.mark.parametrize("cost", ["all", "members"])
def test_kmedoids(cost):
  n, keep = 18, 5
  tokens = batch_of(rows(3, B, n, WIDTH), 1)
  received = np.abs(rows(4, B, H, n)) + 0.1
  result = reduce_once(
    "kmedoids",
    tokens,
    keep,
    received_attention=received,
    options={"cost": cost},
  )
  for e in range(B):
    x = np.asarray(tokens.x[e], np.float64)
    weight = received[e].mean(0)[1:]
    seeds = sorted(range(n - 1), key=lambda i: -weight[i])[:keep]
    medoids = reference.kmedoids(x[1:], seeds, weight, 3, cost)
    kept = [0] + [1 + i for i in medoids]
    np.testing.assert_array_equal(result.plan.anchor[e], kept)
    np.testing.assert_array_equal(
      result.tokens.x[e], tokens.x[e][np.array(kept)]
    )
    np.testing.assert_array_equal(result.tokens.size[e], np.ones(keep + 1))


def test_kmedoids_without_weights_starts_with_the_farthest():
  x = rows(6, 20, 3)
  seeds = reference.farthest_first(x, 6)
  tokens = jnp.asarray(x)
  match = jax.jit(matching.kmedoids, static_argnames=("keep", "iterations"))
  plan = match(tokens, keep=6, iterations=0)
  np.testing.assert_array_equal(plan.anchor, seeds)
  plan = match(tokens, keep=6, iterations=2)
  medoids = reference.kmedoids(x, seeds, np.ones(20), 2, "members")
  np.testing.assert_array_equal(plan.anchor, medoids)


@pytest.mark.parametrize("normalise", [False, True])
def test_expedit(normalise):
  grid, cells, tau, window, near = (7, 5), (4, 3), 0.2, 3, 4
  n, m = 35, 12
  tokens = batch_of(rows(7, 2, 1 + n, WIDTH), 1)
  assert matching.cells_of(grid, m) == cells
  result = reduce_once(
    "expedit",
    tokens,
    m,
    grid=grid,
    options=dict(
      temperature=tau, window=window, neighbours=near, normalise=normalise
    ),
  )
  for e in range(2):
    x = np.asarray(tokens.x[e], np.float64)
    centre = reference.soft_kmeans(x[1:], grid, cells, 5, tau, window)
    np.testing.assert_allclose(result.tokens.x[e, 1:], centre, atol=1e-5)
    np.testing.assert_array_equal(result.tokens.x[e, 0], tokens.x[e, 0])
    back = reference.reconstruction(
      x[1:], centre, tau, near, norm=1 if normalise else 2
    )
    np.testing.assert_allclose(result.restored[e, 1:], back @ centre, atol=1e-5)
    np.testing.assert_array_equal(result.restored[e, 0], tokens.x[e, 0])


def test_token_transforming():
  n, keep, temperature = 13, 4, 0.2
  tokens = batch_of(rows(9, B, n, WIDTH), 1, sizes(9, B, n))
  keys, attention = rows(10, B, H, n, WIDTH), np.abs(rows(11, B, H, n))
  result = reduce_once(
    "token_transforming",
    tokens,
    keep,
    keys=keys,
    class_attention=attention,
    options={"temperature": temperature},
  )
  for e in range(B):
    score = attention[e].mean(0)[1:]
    anchors = sorted(range(n - 1), key=lambda i: -score[i])[:keep]
    share = reference.token_transforming(
      keys[e].mean(0)[1:], anchors, temperature
    )
    weight = share / share.sum(1, keepdims=True)
    x, size = np.asarray(tokens.x[e]), np.asarray(tokens.size[e])
    np.testing.assert_allclose(
      result.tokens.x[e, 1:], weight @ x[1:], atol=1e-5
    )
    np.testing.assert_allclose(
      result.tokens.size[e, 1:], share @ size[1:], rtol=1e-5
    )
    np.testing.assert_array_equal(result.tokens.x[e, 0], x[0])
    back = result.restored[e, 1:]
    np.testing.assert_allclose(back, share.T @ (weight @ x[1:]), atol=1e-5)
