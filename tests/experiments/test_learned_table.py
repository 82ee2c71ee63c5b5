"""The table of learned methods, with two steps of training everywhere."""

import json

import pytest

from experiments.sweeps import learned_table


@pytest.mark.slow
def test_compares_a_method_with_itself_untrained_and_with_chance(tmp_path):
  run = lambda: learned_table.main(
    tmp_path, ("token_learner",), seeds=1, local=True
  )
  rows = run()
  assert [row["selection"] for row in rows] == [
    "trained", "untrained", "random", "unreduced",
  ]  # fmt: skip
  cost = {row["selection"]: row["gflops"] for row in rows}
  assert cost["trained"] == cost["untrained"]
  assert all(0 <= row["accuracy"] <= 100 for row in rows)
  assert json.loads((tmp_path / "rows.json").read_text()) == rows
  assert "| token_learner | trained |" in (tmp_path / "table.md").read_text()
  before = (tmp_path / "token_learner-0" / "done").stat().st_mtime_ns
  assert run() == rows
  after = (tmp_path / "token_learner-0" / "done").stat().st_mtime_ns
  assert before == after, "what is done is not made again"


def test_unknown_methods_are_refused(tmp_path):
  with pytest.raises(ValueError, match="methods=.'evitt'.*evit"):
    learned_table.main(tmp_path, ("evitt",))
