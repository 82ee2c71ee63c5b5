"""Combinations against single methods, on rows that are made here."""

import numpy as np
import pytest

from configs import vlm_budget
from experiments.sweeps import question_budget
from experiments.sweeps.results import Results
from tokjax import recipes


def row(method, keep, right, gflops=1.0):
  return {
    "method": method, "keep": keep, "gflops": gflops, "logical_bytes": 8.0,
    "right": question_budget.words_of(right),
  }  # fmt: skip


def found(tmp_path, *rows):
  results = Results(tmp_path / "rows.json", {})
  whole = row("none", 1.0, np.ones((2, 200), bool), gflops=4.0)
  results.rows = [{**whole, "logical_bytes": 16.0}, *rows]
  return question_budget.verdicts(results)


def share(p, seed):
  return np.random.default_rng(seed).random((2, 200)) < p


def test_a_better_combination_is_found(tmp_path):
  flops, held = found(
    tmp_path, row("a", 0.5, share(0.5, 0)), row("b", 0.5, share(0.6, 1)),
    row("a^1/2+b^1/2", 0.5, share(0.9, 2)),
  )  # fmt: skip
  assert flops.startswith("combinations with at most 25% of the FLOPs of pre")
  assert "better: +" in flops and "a^1/2+b^1/2 (0.5) against b (0.5)" in flops
  assert "at most 50% of the bytes of the cache: better" in held


def test_one_that_costs_more_does_not_count(tmp_path):
  lines = found(
    tmp_path, row("a", 0.5, share(0.5, 0)),
    row("a^1/2+b^1/2", 0.5, share(0.9, 1), gflops=2.0),
  )  # fmt: skip
  assert len(lines) == 1 and "bytes of the cache" in lines[0]


def test_the_luckiest_of_many_is_not_better(tmp_path):
  many = [row(f"a^1/2+b{i}^1/2", 0.5, share(0.5, i + 9)) for i in range(40)]
  lines = found(tmp_path, row("a", 0.5, share(0.5, 0)), *many)
  # On the questions that it was chosen by, the best of 40 is far ahead.
  lucky = max(question_budget.read(r["right"]).mean() for r in many)
  assert lucky > 0.54
  assert all("not different" in line for line in lines)


def test_words_are_read_back():
  right = share(0.5, 3)
  words = question_budget.words_of(right)
  np.testing.assert_array_equal(question_budget.read(words), right)


@pytest.mark.parametrize("name", vlm_budget.combinations())
def test_combinations_share_one_keep_ratio(name):
  joined = recipes.find(name)
  # A store of few bits has no share: no keep ratio turns it.
  shares = [share for share in joined.shares if share is not None]
  assert joined.name == name and sum(shares) == 1
  assert recipes.get(name, keep=0.25) != recipes.get(name, keep=0.5)
