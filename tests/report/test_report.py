"""The whole report at tiny sizes, its numbers and its tables."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from scripts.report import exact, stages, tables
from scripts.report.supervise import ROOT


@pytest.mark.slow
def test_every_stage_runs_tiny_on_a_cpu(tmp_path):
  """From elsewhere, and with nothing on the path but what is installed."""
  script = str(ROOT / "scripts" / "accelerator_report.py")
  done = subprocess.run(
    [sys.executable, "-P", script, "--out", "out", "--minutes", "30",
     "--commit", "abc"],
    cwd=tmp_path, text=True, capture_output=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  out = tmp_path / "out"
  found = json.loads((out / "report.json").read_text())
  assert found["facts"]["commit"] == "abc"
  assert found["facts"]["platform"] == "cpu"
  log = (out / "log.txt").read_text()
  assert [s["name"] for s in found["stages"]] == [s.name for s in stages.STAGES]
  for stage in found["stages"]:
    assert stage["status"] == "done", log
    assert stage["rows"]
    for row in stage["rows"]:
      if stage["name"] == "flex":
        assert "on a GPU" in row["skipped"]
      elif stage["letter"] == "a":
        assert row["right"], row
      else:
        assert row["seconds"] > 0, row
  report = (out / "report.md").read_text()
  assert report in done.stdout
  assert "| 32k top-k backward |" in report
  assert {path.name for path in out.iterdir()} == {
    "log.txt", "report.json", "report.md"
  }  # fmt: skip


def timed(name, seconds, **fields):
  spread = {"fastest": 0.9 * seconds, "slowest": 1.1 * seconds}
  return {"name": name, "seconds": seconds, **spread, **fields}


def test_cells_follow_from_what_was_measured():
  rows = {
    row["name"]: row
    for row in (
      timed(tables.PEAK, 2.0, flops=8e14),
      timed("ours", 0.5, flops=1e14, bytes=2e12, against="theirs", density=0.1),
      timed("theirs", 1.0, against="theirs"),
      {"name": "lost", "error": "a | b", "against": "theirs"},
    )
  }
  cells = {name: tables.line(row, rows) for name, row in rows.items()}
  assert cells["ours"] == {
    "what": "ours", "ms": "500", "spread": "10.0 %", "TFLOP/s": "200",
    "of peak": "50.0 %", "GB/s": "4000", "times": "2", "rival": "theirs",
    "density": "0.1",
  }  # fmt: skip
  assert "times" not in cells["theirs"]
  assert cells["lost"] == {"what": "lost", "note": "error: a | b"}
  stage = {
    "letter": "f", "name": "tiles", "about": "a search", "best": 2,
    "status": "done", "seconds": 3.0, "rows": list(rows.values()),
  }  # fmt: skip
  assert tables.ordered(stage, rows)[0]["name"] == "ours"
  assert len(tables.ordered(stage, rows)) == 2
  page = tables.report({"device": "A card"}, [stage | {"best": None}])
  assert page.startswith("# A card\n")
  assert "A search. Done, after 3 s." in page
  assert "| error: a / b |" in page


def test_a_card_that_jax_does_not_see_is_said():
  page = tables.report({"platform": "cpu", "card": "H200"}, [])
  assert "JAX does not see it" in page


def test_a_wrong_result_or_gradient_is_found():
  arrays = {"x": np.asarray(jnp.arange(1, 9, dtype=jnp.bfloat16))}

  def call(arrays, fixed, implementation):
    x = arrays["x"]
    if implementation == "wrong result":
      return (x * x * 1.1,)
    if implementation == "wrong slope":
      return (x * x + 2 * (x - x.astype(int)),)
    if implementation == "nan":
      return (jnp.where(x > 7, jnp.nan, x * x),)
    return (x * x,)

  check = lambda name: exact.check(call, arrays, None, name)
  assert check("right")["right"]
  assert check("right")["by"] < 1e-2
  assert check("wrong result")["most off"] == "result 0"
  assert check("wrong slope")["most off"] == "d_x"
  assert check("nan")["by"] == float("inf")
  for name in ("wrong result", "wrong slope", "nan"):
    assert not check(name)["right"]


def test_an_empty_row_has_to_agree():
  line = np.asarray([-np.inf, 1.0])
  assert exact.error(line, line) == 0
  assert exact.error(np.asarray([0.0, 1.0]), line) == float("inf")
  assert exact.error(np.asarray([-np.inf, 1.1]), line) == pytest.approx(0.1)
  assert exact.error(np.zeros(2), np.zeros(2)) == 0
