"""keep = 1 keeps every entry of a prompt; no budget floors to nothing."""

import numpy as np
import pytest

from tests.cache import cases
from tokjax import budgets, recipes
from tokjax.cache.limits import Limits

LENGTHS = np.arange(65)
EVICTING = [
  name
  for name in cases.names()
  if getattr(recipes.get(name).cache, "evict", None) is not None
]


def counts(name, keep):
  """Entries that stay of prompts of every length, in the last layer."""
  slots = recipes.get(name, keep=keep, **cases.options_of(name))
  layer = cases.layers()[-1]
  return np.minimum(Limits.of(slots.cache.evict, layer, 64).count, LENGTHS)


@pytest.mark.parametrize("name", EVICTING)
def test_keep_one_keeps_every_entry_of_a_prompt(name):
  np.testing.assert_array_equal(counts(name, 1.0), LENGTHS)


@pytest.mark.parametrize("name", EVICTING)
def test_no_budget_floors_to_nothing(name):
  assert counts(name, 0.01)[1:].min() >= 1


def test_h2o_keeps_all_of_nine_tokens_and_of_one():
  assert counts("h2o", 1.0)[[1, 9]].tolist() == [1, 9]


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.3])
def test_sums_lose_nothing_to_rounding(keep):
  turned = budgets.Sum(budgets.Share(0.1), budgets.Share(0.1)).with_keep(keep)
  whole = budgets.Share(keep)
  for n in range(2, 65):
    expected = max(whole.count(n, 0, 1), turned.b.count(n, 0, 1))
    assert turned.count(n, 0, 1) == expected
