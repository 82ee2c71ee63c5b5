"""Intervals of a loss, and what they say about the order of methods."""

import numpy as np
import pytest

from experiments.sweeps import intervals


def test_an_interval_holds_the_truth_as_often_as_it_says():
  """Two models that are right in 80 % and 70 %, independent images."""
  rng = np.random.default_rng(0)
  inside = []
  for _ in range(400):
    whole = rng.random((1, 300)) < 0.8
    found = intervals.lost(whole, whole & (rng.random((1, 300)) < 0.875))
    inside.append(abs(found["lost"] - 10) <= found["lost_interval"])
  assert 0.91 < np.mean(inside) < 0.98


def test_images_are_compared_with_themselves():
  """Half of the images are hard for both: that widens nothing."""
  whole = np.array([[True, False] * 50])
  same = intervals.lost(whole, whole)
  assert same.pop("lost_by_seed") == [0] and not any(same.values())
  own = whole.copy()
  own[0, :10] = False
  found = intervals.lost(whole, own)
  assert found["lost"] == pytest.approx(5)
  expected = 196 * np.sqrt(0.05 * 0.95 / 99)
  assert found["lost_interval"] == pytest.approx(expected)


def test_seeds_that_differ_widen_it():
  whole = np.ones((2, 100), bool)
  own = whole.copy()
  own[0, :20] = False
  found = intervals.lost(whole, own)
  assert found["lost_by_seed"] == pytest.approx([20, 0])
  assert found["lost"] == pytest.approx(10)
  assert found["lost_interval"] > 1.96 * 10 > found["lost_interval_images"]


def test_seeds_that_agree_about_the_order():
  losses = {"a": [1, 2], "b": [2, 3], "c": [5, 9]}
  losses = {name: np.asarray(x, float) for name, x in losses.items()}
  assert intervals.agreement(losses) == 1
  turned = {name: x * [1, -1] for name, x in losses.items()}
  assert intervals.agreement(turned) == -1
  assert np.isnan(intervals.agreement({"a": np.ones(2)}))
  assert np.isnan(intervals.agreement({}))


def test_who_is_not_clearly_better_than_the_reference():
  by_seed = {
    "random": [20.0, 4.0],  # The second model is easier for all.
    "good": [14.0, 1.0],
    "within the noise": [19.5, 3.5],
    "for one seed only": [2.0, 5.0],
  }
  by_seed = {name: np.asarray(x) for name, x in by_seed.items()}
  halves = dict.fromkeys(by_seed, np.ones(1))
  unclear = intervals.unclear(by_seed, halves, "random")
  assert unclear == ["within the noise", "for one seed only"]


def test_questions_about_one_text_are_not_independent():
  """Asking each twice does not make the interval narrower."""
  values = np.random.default_rng(0).normal(size=(3, 8))
  once = intervals.difference(values)
  twice = np.repeat(values, 2, axis=1)
  grouped = intervals.difference(twice, np.repeat(range(8), 2))
  assert grouped.half_examples == pytest.approx(once.half_examples)
  assert intervals.difference(twice).half_examples < once.half_examples
  # Groups of other sizes: the sum over the residuals of each.
  uneven = intervals.difference(np.array([[3.0, 1, 0, 0]]), [0, 0, 1, 2])
  sums = np.array([2.0, -1, -1])
  variance = (sums**2).sum() / 2 * 3 / 16
  assert uneven.half == pytest.approx(1.96 * variance**0.5)
