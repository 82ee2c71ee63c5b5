"""Merging recipes against slow references, example by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recipes import reference_merging as reference
from tests.recipes.answering import answers_of
from tests.recipes.sites_merging import batch_of, reduce_once, sizes
from tests.recipes.sites_pruning import rows
from tokjax import recipes, selection
from tokjax.plan import move_batch
from tokjax.reduce.stage import Stage

B, H, WIDTH = 4, 2, 6


def check(result, tokens, groups, weight=None):
  """Groups in order, and all that follows from them."""
  size, x = np.asarray(tokens.size), np.asarray(tokens.x, np.float64)
  weight = size if weight is None else weight
  for e, expected in enumerate(groups):
    assert result.groups(e) == [set(g) for g in expected]
    merged = reference.mean(expected, x[e], weight[e])
    back = reference.restore(expected, merged)
    total = reference.total(expected, size[e])
    np.testing.assert_allclose(result.tokens.x[e], merged, atol=1e-5)
    np.testing.assert_array_equal(result.tokens.size[e], total)
    np.testing.assert_allclose(result.restored[e], back, atol=1e-5)


def case(n, protected):
  """Tokens with sizes, and keys."""
  tokens = batch_of(rows(n, B, n, WIDTH), protected, sizes(n, B, n))
  return tokens, rows(n + 1, B, H, n, WIDTH)


@pytest.mark.parametrize(
  ("n", "protected", "remove"),
  [(14, 0, 5), (15, 1, 4), (15, 1, 7), (14, 1, 6), (17, 2, 3)],
)
def test_tome(n, protected, remove):
  tokens, keys = case(n, protected)
  result = reduce_once("tome", tokens, n - protected - remove, keys=keys)
  groups = [reference.tome(k.mean(0), remove, protected) for k in keys]
  check(result, tokens, groups)


@pytest.mark.parametrize("k", [2, 3])
def test_tome_kth(k):
  tokens, keys = case(12, 0)
  result = reduce_once("tome_kth", tokens, 12 // k, keys=keys)
  target = list(range(k - 1, 12, k))
  groups = [reference.tome_to(m.mean(0), target) for m in keys]
  if k == 2:
    half = [reference.tome(m.mean(0), 6, 0) for m in keys]
    assert list(map(sorted, groups[0])) == list(map(sorted, half[0]))
  check(result, tokens, groups)


def test_tome_random():
  tokens, keys = case(12, 1)
  result = reduce_once(
    "tome_random", tokens, 5, key=jax.random.key(0), keys=keys
  )
  groups, drawn = [], set()
  for e in range(B):
    target = [int(i) - 1 for i in result.plan.anchor[e][1:]]
    assert target == sorted(set(target))
    drawn.add(tuple(target))
    merged = reference.tome_to(keys[e].mean(0)[1:], target)
    groups.append([[0]] + [[i + 1 for i in g] for g in merged])
  assert len(drawn) > 1, "every example draws its own targets"
  check(result, tokens, groups)


@pytest.mark.parametrize("random", [False, True])
def test_tomesd(random):
  grid, cell, remove = (5, 4), (2, 2), 9
  tokens = batch_of(rows(3, B, 20, WIDTH))
  result = reduce_once(
    "tomesd",
    tokens,
    20 - remove,
    grid=grid,
    key=jax.random.key(0),
    options={"random": random, "cell": cell},
  )
  whole, groups, drawn = reference.cells(grid, cell), [], set()
  for e in range(B):
    target = [int(i) for i in result.plan.anchor[e][-len(whole) :]]
    for members in whole:
      (found,) = set(members) & set(target)
      assert random or found == members[0]
    drawn.add(tuple(target))
    groups.append(reference.tomesd(np.asarray(tokens.x[e]), target, remove))
  assert (len(drawn) > 1) == random
  check(result, tokens, groups)


@pytest.mark.parametrize(
  ("blocks", "features", "protected"),
  [("first", "keys", 1), ("last", "keys", 0), ("none", "hidden", 1)],
)
def test_pitome(blocks, features, protected):
  layer, depth, remove, margin = 2, 5, 4, 0.75
  n = 13 + protected
  tokens, keys = case(n, protected)
  result = reduce_once(
    "pitome",
    tokens,
    13 - remove,
    layer=layer,
    depth=depth,
    keys=keys,
    options={"bsm_blocks": blocks, "features": features, "margin": margin},
  )
  metric = keys.mean(1) if features == "keys" else np.asarray(tokens.x)
  groups = []
  for m in metric[:, protected:]:
    merged = reference.pitome(
      m, margin * (1 - layer / depth), remove, all_ranked=blocks == "first"
    )
    front = [[i] for i in range(protected)]
    groups.append(front + [[i + protected for i in g] for g in merged])
  check(result, tokens, groups)


def mctf_case(n, protected):
  tokens, _ = case(n, protected)
  attention = np.exp(2 * rows(n + 2, B, H, n, n))
  attention /= attention.sum(-1, keepdims=True)
  return tokens, attention, attention.mean(2)


@pytest.mark.parametrize(
  ("n", "protected", "remove", "temperatures"),
  [
    (15, 1, 5, (1.0, 20.0, 40.0)),
    (14, 0, 7, (1.0, 20.0, 40.0)),
    (15, 1, 1, (1.0, 1.0, 1.0)),
    (15, 1, 6, (0.0, 2.0, 0.0)),
  ],
)
def test_mctf(n, protected, remove, temperatures):
  tokens, attention, received = mctf_case(n, protected)
  result = reduce_once(
    "mctf",
    tokens,
    n - protected - remove,
    attention=attention,
    received_attention=received,
    options={"temperatures": temperatures},
  )
  mass, size = received.mean(1), np.asarray(tokens.size)
  groups = []
  for e in range(B):
    weights = reference.mctf_weights(
      np.asarray(tokens.x[e], np.float64), mass[e], size[e], temperatures
    )
    groups.append(reference.mctf(weights, remove, protected))
  check(result, tokens, groups, mass * size)


def test_mctf_learns_nothing_through_its_weights():
  tokens, *maps = mctf_case(15, 1)
  attention, received = map(jnp.asarray, maps)
  stage = Stage(recipes.get("mctf").reduce[0], 9, 1, 12, 1, 14)

  def loss(received):
    answers = answers_of(
      stage.reduce, 1, 12, attention=attention, received_attention=received
    )
    plan, _ = stage.plan(tokens, answers)
    return (move_batch(plan, tokens).x ** 2).sum()

  assert not np.any(jax.jit(jax.grad(loss))(received))


@pytest.mark.parametrize("axis", [0, -1])
def test_the_first_largest_is_what_argmax_finds(axis):
  values = np.random.default_rng(0).integers(0, 4, (6, 9)).astype(np.float32)
  values[2] = values[:, 5] = -np.inf
  best, first = selection.first_max(jnp.asarray(values), axis)
  np.testing.assert_array_equal(best, values.max(axis))
  np.testing.assert_array_equal(first, values.argmax(axis))


def test_composed_plans_are_the_official_source_map():
  tokens, _ = case(19, 1)
  source, plans = [[{i} for i in range(19)]] * B, []
  for layer, remove in enumerate((6, 4)):
    n = tokens.num_tokens
    keys = rows(50 + layer, B, H, n, WIDTH)
    result = reduce_once("tome", tokens, n - 1 - remove, keys=keys)
    groups = [reference.tome(k.mean(0), remove, 1) for k in keys]
    source = [
      [set().union(*(s[i] for i in g)) for g in merged]
      for s, merged in zip(source, groups, strict=True)
    ]
    plans.append(result.plan)
    tokens = result.tokens
  compose = jax.vmap(lambda a, b: a.then(b).matrix())
  for e, matrix in enumerate(np.asarray(jax.jit(compose)(*plans))):
    assert [set(np.flatnonzero(row)) for row in matrix] == source[e]
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
