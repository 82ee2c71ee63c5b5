"""The numbers that the cards of EViT, ATS and Zero-TPrune promise."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import recipes, scores, selection
from tokjax.plan import move
from tokjax.recipes.vision import pruning
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Answers, Values
from tokjax.tokens import Kind, Tokens


def site(score, values, keep):
  """One head, a class token and scalar patches with the given attention."""
  n = len(score)
  kind = jnp.array([Kind.CLASS] + [Kind.PATCH] * n, jnp.int32)
  x = jnp.array([[9.0]] + [[v] for v in values])
  attention = jnp.array([[0.0] + list(score)])
  return Site(
    Tokens.create(x, kind=kind),
    Answers((CLASS.answered(0),), (attention,)),
    keep,
    protected=1,
  )


def moved(rule, site):
  return np.asarray(move(site.lift(rule(site)), site.tokens).x)[:, 0]


def test_evit_keeps_the_top_and_fuses_the_rest_unnormalised():
  at = site((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0), 3)
  np.testing.assert_allclose(
    moved(pruning.evit_rule, at), [9, 4, 3, 0.5], rtol=1e-6
  )
  np.testing.assert_array_equal(
    moved(pruning.topk_rule, dataclasses.replace(at, keep=2)), [9, 4, 3]
  )


def test_evit_with_nothing_kept_is_the_mean_of_equals():
  at = site((0.25,) * 4, (1.0, 2.0, 3.0, 6.0), 1)
  np.testing.assert_allclose(moved(pruning.evit_rule, at), [9, 3], rtol=1e-6)


def test_the_size_of_a_fused_token_counts_its_members():
  at = site((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0), 3)
  out = move(at.lift(pruning.evit_rule(at)), at.tokens)
  np.testing.assert_array_equal(out.size, [1, 1, 1, 2])


@pytest.mark.parametrize(
  ("name", "after"),
  [("evit", (139, 99, 71)), ("topk", (138, 97, 68)), ("random", (137, 96, 67))],
)
def test_counts_of_196_patches(name, after):
  (counts,) = recipes.get(name).counts(196, 12)
  expected = [None] * 12
  for layer, count in zip((3, 6, 9), after, strict=True):
    expected[layer] = count
  assert counts == tuple(expected)


def test_ats_has_room_for_all_from_a_quarter_of_the_depth():
  (counts,) = recipes.get("ats").counts(196, 12)
  assert counts == (None,) * 3 + (196,) * 9


@pytest.mark.parametrize(
  ("score", "k", "code", "paper"),
  [
    ((0.1, 0.2, 0.3, 0.4), 4, {1, 2, 3}, {0, 1, 2, 3}),
    ((0.02, 0.02, 0.03, 0.03, 0.9), 5, {1, 3, 4}, {3, 4}),
  ],
)
def test_ats_samples(score, k, code, paper):
  for rule, expected in (("code", code), ("paper", paper)):
    chosen = selection.inverse_cdf(jnp.array(score), k, rule=rule)
    assert set(np.flatnonzero(chosen)) == expected


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_ats_keeps_nearly_all_of_equals_and_never_more_than_points(rule):
  chosen = selection.inverse_cdf(jnp.ones((16,)), 16, rule=rule)
  assert 15 <= chosen.sum() <= 16
  some = selection.inverse_cdf(jnp.arange(1.0, 17.0), 5, rule=rule)
  assert 1 <= some.sum() <= 5


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_ats_samples_a_padded_example_as_if_it_were_alone(rule):
  score = jnp.array([0.1, 0.5, 0.2, 0.4, 0.3])
  mask = jnp.array([1, 0, 1, 1, 1, 0, 1], bool)
  padded = jnp.full((7,), 9.0).at[jnp.flatnonzero(mask)].set(score)
  for points in (2, 4):
    alone = selection.inverse_cdf(score, points, rule=rule)
    chosen = selection.inverse_cdf(
      padded, 6, rule=rule, mask=mask, count=jnp.array(points)
    )
    assert not np.any(chosen & ~mask)
    np.testing.assert_array_equal(np.asarray(chosen)[mask], alone)


def test_ats_puts_what_it_picked_in_ascending_score():
  at = site((0.4, 0.1, 0.3, 0.2), (1.0, 2.0, 3.0, 4.0), 4)
  answers = at.answers.add(Values().answered(0), jnp.ones((1, 5, 1)))
  at = dataclasses.replace(at, answers=answers)
  plan = pruning.ats_rule(at, sampling="code")
  np.testing.assert_array_equal(plan.anchor[plan.valid], [3, 2, 0])


MATRIX = jnp.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])


def test_page_rank_of_the_card():
  once = scores.pagerank(MATRIX[None], iterations=1)
  ever = scores.pagerank(MATRIX[None], iterations=200)
  np.testing.assert_allclose(once[0], [0.3167, 0.4333, 0.25], atol=1e-4)
  np.testing.assert_allclose(ever[0], [0.3182, 0.4545, 0.2273], atol=1e-4)
  for iterations in (0, 1, 5, 50):
    s = scores.pagerank(MATRIX[None], iterations=iterations)
    np.testing.assert_allclose(s.sum(), 1.0, rtol=1e-6)


def test_page_rank_starts_where_it_is_told():
  start = jnp.array([np.sqrt(3.0), 1.0, 1.0])
  once = scores.pagerank(MATRIX[None], iterations=1, start=start)
  expected = np.asarray(MATRIX).T @ (start / start.sum())
  np.testing.assert_allclose(once[0], expected, rtol=1e-6)


def test_heads_vote_by_the_spread_of_their_scores():
  flat = np.full((4,), 0.25)
  fair = np.array([0.1, 0.2, 0.3, 0.4])
  steep = np.array([0.0, 0.0, 0.0, 1.0])
  heads = jnp.asarray(np.stack([flat, fair, steep]), jnp.float32)
  assert np.var(fair * 4) == pytest.approx(0.2)
  only = scores.rms_over_heads(heads, variance=(0.01, 0.7))
  np.testing.assert_allclose(only, fair, rtol=1e-6)
  every = np.sqrt((flat**2 + fair**2 + steep**2) / 3)
  np.testing.assert_allclose(scores.rms_over_heads(heads), every, rtol=1e-6)
  none = scores.rms_over_heads(heads, variance=(5.0, 6.0))
  np.testing.assert_allclose(none, every, rtol=1e-6)


def test_the_filter_does_not_depend_on_the_number_of_tokens():
  fair = np.tile([0.1, 0.2, 0.3, 0.4], 50) / 50
  heads = jnp.asarray(np.stack([fair, np.eye(200)[0]]), jnp.float32)
  only = scores.rms_over_heads(heads, variance=(0.01, 0.7))
  np.testing.assert_allclose(only, fair, rtol=1e-5)
