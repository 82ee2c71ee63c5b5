"""The space that VFlowOpt's search goes through, and where it looks next."""

import numpy as np
import pytest

from scripts.vflowopt_search import Space, propose


def test_card_the_third_ratio_follows_from_the_target():
  # A quarter of the tokens in 28 blocks of which 9, 9 and 10 have each number.
  space = Space(0.25, 28, 27)
  found = space.settings(np.array([0.1208, 0.964, 0.6952, 0.599]))
  np.testing.assert_allclose(found.ratios[:2], [0.2651, 0.9832], atol=1e-4)
  assert found.threshold == pytest.approx(34.76)
  assert found.cell == pytest.approx(15.58, abs=1e-2)
  first, second, third = found.ratios
  blocks = 9 * first + 9 * first * second + 10 * first * second * third
  assert blocks / 28 == pytest.approx(0.25, abs=1e-4)


def test_every_point_is_a_recipe():
  rng = np.random.default_rng(0)
  for point in (*np.eye(4), *rng.random((20, 4))):
    found = Space(0.25, 4, 4).settings(point)
    assert all(0 < x <= 1 for x in found.ratios) and found.cell >= 1
    assert len(found.slots().reduce) == 2


def test_it_looks_where_improvement_is_expected():
  rng = np.random.default_rng(1)
  points = rng.random((12, 2))
  found = -((points - 0.6) ** 2).sum(axis=1)
  point = propose(points, found, rng)
  assert np.abs(point - 0.6).max() < 0.3
