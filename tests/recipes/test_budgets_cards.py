"""Budgets give the counts that papers and official code give."""

import math

import numpy as np
import pytest

from tests.recipes import reference_pruning as reference
from tokjax import budgets
from tokjax.budgets import BudgetError
from tokjax.reduce import stages


def removed(budget, tokens, depth):
  left, out = tokens, []
  for after in budget.counts(tokens, depth):
    after = left if after is None else after
    out.append(left - after)
    left = after
  return out


@pytest.mark.parametrize("depth", [2, 4, 12, 24])
@pytest.mark.parametrize("slope", [-1.0, -0.5, -1 / 3, 0.0, 0.3, 0.75, 1.0])
def test_linear_is_tomes_r_with_inflection(slope, depth):
  for r in range(40):
    budget = budgets.Linear(r, slope)
    expected = reference.tome_removals(r, slope, depth)
    assert removed(budget, 10**4, depth) == expected


def test_linear_of_the_paper_falls_from_twice_r_to_none():
  assert removed(budgets.Linear(11, -1.0), 196, 12) == [
    22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0,
  ]  # fmt: skip


def test_constant_r_of_tome_on_deit():
  assert budgets.Constant(13).counts(196, 12) == tuple(
    196 - 13 * i for i in range(1, 13)
  )
  first = budgets.Constant(13, first=10).counts(196, 12)
  assert first == (None,) * 10 + (183, 170)


@pytest.mark.parametrize("rho", [0.9, 0.7, 0.5, 0.25])
def test_ratio_of_the_initial_number(rho):
  """TokenReduction's protocol: floor(196 rho^t)."""
  counts = [c for c in budgets.Ratio(rho).counts(196, 12) if c is not None]
  assert counts == [int(196 * rho**t) for t in (1, 2, 3)]


@pytest.mark.parametrize(
  ("tokens", "rho", "exact", "official"),
  [(90, 0.7, 63, 62), (100, 0.7, 49, 48), (125, 0.6, 27, 26)],
)
def test_counts_are_exact_where_int_of_a_product_is_not(
  tokens, rho, exact, official
):
  """A difference that recipes declare."""
  stages = {63: 1, 49: 2, 27: 3}[exact]
  counts = budgets.Ratio(rho).counts(tokens, 12)
  kept = [c for c in counts if c is not None]
  assert kept[stages - 1] == exact
  assert int(tokens * rho**stages) == official


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("rho", [0.9, 0.7, 0.5])
def test_ratio_of_the_current_number(rho, extra):
  """EViT: ceil(rho (N - 1)) of what is there, fused tokens included."""
  budget = budgets.Ratio(rho, None, "current", "ceil", extra=extra)
  for tokens in (4, 17, 64, 196, 576):
    left, expected = tokens, [None] * 12
    for layer in (3, 6, 9):
      kept = math.ceil(rho * left)
      if kept == left:
        continue
      left = expected[layer] = kept + extra
    assert budget.counts(tokens, 12) == tuple(expected)


def test_nothing_happens_where_rounding_keeps_all():
  budget = budgets.Ratio(0.7, (0, 1), "current", "ceil", extra=1)
  assert budget.counts(3, 2) == (None, None)
  assert budget.counts(4, 2) == (4, 4)
  assert budgets.Ratio(1.0).counts(196, 12) == (None,) * 12


def test_rounding_does_not_trip_over_decimals():
  assert budgets.Ratio(0.7, (0,)).counts(10, 1) == (7,)
  assert budgets.Ratio(0.29, (0,)).counts(100, 1) == (29,)
  up = budgets.Ratio(0.07, (0,), rounding="ceil")
  assert up.counts(100, 1) == (7,)


@pytest.mark.parametrize("depth", [2, 3, 4, 6, 12, 24])
def test_stages_are_quarters(depth):
  assert all(0 < layer < depth for layer in budgets.stages(depth))
  assert budgets.stages(12) == (3, 6, 9)


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("tokens", [16, 64, 196])
def test_even_ends_where_it_should_in_even_steps(tokens, keep):
  for first in (0, 2):
    steps = removed(budgets.Even(keep, first), tokens, 12)
    assert tokens - sum(steps) == max(1, round(tokens * keep))
    assert not any(steps[:first])
    assert max(steps[first:]) - min(steps[first:]) <= 1


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_keep_ends_a_ratio_there(keep):
  """Each of three floors and a rounded rho lose less than a token."""
  counts = budgets.Ratio(0.7).with_keep(keep).counts(196, 12)
  assert 0 <= keep * 196 - counts[9] < 1 + 196e-6 * 3
  assert counts[3] > counts[6] > counts[9]


def test_once_square_capped_fixed():
  assert budgets.Once(0.5).counts(64, 3) == (32, None, None)
  assert budgets.Once(0.5, 0.75).counts(64, 4) == (None, None, None, 32)
  assert budgets.Once(0.001).counts(64, 1) == (1,)
  for keep in np.linspace(0.05, 1, 20):
    (count,) = budgets.Square(float(keep)).counts(64, 1)[:1]
    assert count is None or math.isqrt(count) ** 2 == count
  assert budgets.Capped(0.25, 0.5).counts(64, 4) == (None, None, 16, 16)
  assert budgets.Fixed((None, 9)).counts(64, 2) == (None, 9)


@pytest.mark.parametrize(
  "budget",
  [
    budgets.Constant(3),
    budgets.Linear(3),
    budgets.Removals((3, 1)),
    budgets.Even(0.7, 1),
    budgets.Ratio(0.7),
    budgets.Ratio(0.7).with_keep(0.4),
    budgets.Once(0.5, 1),
    budgets.Square(0.5),
    budgets.Capped(1.0, 0.25),
    budgets.Fixed((None, 5, None, None)),
  ],
)
def test_every_schedule_is_a_hashable_turnable_value(budget):
  assert isinstance(budget, budgets.Budget)
  turned = budget.with_keep(0.5)
  assert hash(turned) == hash(budget.with_keep(0.5))
  assert type(turned)(**vars(turned)) == turned
  left = [c for c in turned.counts(64, 4) if c is not None]
  assert abs(left[-1] - 32) <= 7
  if not isinstance(turned, budgets.Capped):
    assert all(c is None for c in budget.with_keep(1.0).counts(64, 4))


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: budgets.Constant(-1), r"r=-1: .*non-negative"),
    (lambda: budgets.Constant(2.5), r"r=2.5: .*integer"),
    (lambda: budgets.Constant(1, 4).counts(9, 4), r"first=4: .*0..3"),
    (lambda: budgets.Linear(3, 2.0), r"slope=2.0: .*\[-1, 1\]"),
    (lambda: budgets.Removals((1, -2)), r"r\[1\]=-2"),
    (lambda: budgets.Even(0.0), r"keep=0.0: .*\(0, 1\]"),
    (lambda: budgets.Even(0.5, -1).counts(9, 4), r"first=-1: .*0..3"),
    (lambda: budgets.Ratio(1.2), r"rho=1.2: .*\(0, 1\]"),
    (lambda: budgets.Ratio(float("nan")), r"rho=nan: .*\(0, 1\]"),
    (lambda: budgets.Ratio("0.5"), r"rho='0.5': .*\(0, 1\]"),
    (lambda: budgets.Ratio(0.5, base="all"), r"base='all': .*current"),
    (lambda: budgets.Ratio(0.5, rounding="up"), r"rounding='up': .*ceil"),
    (lambda: budgets.Ratio(0.5, extra=-1), r"extra=-1: .*non-negative"),
    (lambda: budgets.Ratio(0.5, (3, 9)).counts(9, 4), r"layers=9: .*0..3"),
    (lambda: budgets.Ratio(0.5).with_keep(0), r"keep=0: .*\(0, 1\]"),
    (lambda: budgets.Once(1.5), r"keep=1.5: .*\(0, 1\]"),
    (lambda: budgets.Once(0.5, 1.0).counts(9, 4), r"layer=1.0: .*below 1.0"),
    (lambda: budgets.Capped(0.5, 7).counts(9, 4), r"layer=7: .*0..3"),
    (lambda: budgets.Fixed((1.5,)), r"after\[0\]=1.5: .*integer"),
    (lambda: budgets.Fixed((3,)).counts(9, 4), r"1 entries.*4 blocks"),
  ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(
  build, message, as_users_run_it
):
  with pytest.raises(BudgetError, match=message):
    build()


@pytest.mark.parametrize(
  ("counts", "at_most", "message"),
  [
    ((None, 5, 0), 1.0, r"some: .*block 2: 5 are left and 5 .*larger fraction"),
    ((9, 4), 0.5, r"some: block 1 .*remove 5 of 9.*at most 4.*more blocks"),
    ((5, 7), 1.0, r"some: block 1 is to leave 7 .*only 5.*Leave fewer"),
  ],
)
def test_what_cannot_be_done_names_recipe_block_and_fix(
  counts, at_most, message
):
  with pytest.raises(BudgetError, match=message):
    stages.check(counts, 10, recipe="some", at_most=at_most)


def test_at_the_end_a_share_is_a_share_however_it_is_given():
  asked = (0.25, budgets.Share(0.25), budgets.Count(4))
  for keep in asked:
    budget = budgets.AtEnd(keep)
    assert budget.counts(16, 3) == (None, None, 4)
    assert budget.with_keep(0.5).counts(16, 3) == (None, None, 8)
