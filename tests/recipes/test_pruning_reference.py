"""Every pruning rule equals its slow reference on random examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recipes import reference_pruning as reference
from tests.recipes.answering import answers_of
from tests.recipes.sites_pruning import (
  WIDTH,
  rows,
  signals_of,
  stage_of,
  tokens_of,
)
from tokjax.budgets import Once
from tokjax.plan import move_batch

BATCH, PATCHES = 12, 13


@pytest.fixture(scope="module")
def given():
  tokens = tokens_of(rows(0, BATCH, 1 + PATCHES, WIDTH))
  return tokens, jax.jit(signals_of)(tokens)


def answered(stage, given):
  return answers_of(stage.reduce, stage.layer, stage.depth, **given)


def planned(stage, given):
  tokens, signals = given
  plan, _ = jax.jit(stage.plan)(tokens, answered(stage, signals))
  return plan


def patches(plan, example):
  """Indices of the patches kept, without the class token."""
  anchor = np.asarray(plan.anchor[example])
  assert anchor[0] == 0
  if plan.valid is not None:
    anchor = anchor[np.asarray(plan.valid[example])]
  return list(anchor[1:] - 1)


def test_topk(given):
  stage = stage_of("topk", PATCHES, 2)
  plan = planned(stage, given)
  for e in range(BATCH):
    attention = np.asarray(given[1]["attention"][e])
    assert patches(plan, e) == reference.topk(attention, stage.keep)


def test_evit(given):
  tokens, signals = given
  stage = stage_of("evit", PATCHES, 2)

  @jax.jit
  def run(tokens, answers):
    plan, _ = stage.plan(tokens, answers)
    return plan, move_batch(plan, tokens)

  plan, out = run(tokens, answered(stage, signals))
  for e in range(BATCH):
    x, attention = np.asarray(tokens.x[e]), np.asarray(signals["attention"][e])
    np.testing.assert_array_equal(out.x[e, 0], x[0])
    np.testing.assert_allclose(
      out.x[e, 1:], reference.evit(x, attention, stage.keep), atol=1e-6
    )
  kept = jnp.take_along_axis(tokens.x, plan.anchor[..., None], axis=1)
  np.testing.assert_array_equal(out.x[:, :-1], kept[:, :-1])
  np.testing.assert_array_equal(out.size[:, -1], PATCHES - stage.keep + 1)
  np.testing.assert_array_equal(out.size.sum(axis=1), 1 + PATCHES)


@pytest.mark.parametrize(
  ("sampling", "keep"), [("code", 1.0), ("code", 0.4), ("paper", 1.0)]
)
def test_ats(given, sampling, keep):
  stage = stage_of("ats", PATCHES, 2, sampling=sampling, keep=keep)
  plan = planned(stage, given)
  for e in range(BATCH):
    attention, values = (
      np.asarray(a[e], np.float64)
      for a in (given[1]["attention"], given[1]["values"])
    )
    score = reference.significance(attention, values)
    expected = reference.ats(score, stage.keep, sampling)
    assert patches(plan, e) == expected


@pytest.mark.parametrize(
  ("layer", "depth", "iterations", "similar"),
  [(1, 4, 30, 0.5), (2, 4, 5, 0.0), (6, 12, 5, 1.0), (11, 12, 1, 0.5)],
)
def test_zero_tprune(given, layer, depth, iterations, similar):
  """Block 11 of 12 reads the attention of block 10, one of the last three."""
  budget, variance = Once(0.5, layer), (0.01, 0.7)
  stage = stage_of(
    "zero_tprune", PATCHES, layer, depth=depth, budget=budget,
    similar=similar, variance=variance,
  )  # fmt: skip
  plan = planned(stage, given)
  for e in range(BATCH):
    attention, keys = (
      np.asarray(given[1][name][e], np.float64)
      for name in ("attention", "keys")
    )
    expected = reference.zero_tprune(
      attention, keys, stage.keep, similar, variance, iterations
    )
    assert patches(plan, e) == expected
