"""Side by side: what a measurement is, and how many make a table."""

import sys

import pytest

from scripts import bench_against
from scripts.against.case import Case
from scripts.against.systems import measure
from tests.interop import checkpoints


def row(system, i, **changes):
  found = {"load": 1.0, "cold": 2.0, "prefill": 1.0, "first": 1.1,
           "decode": 0.5, "peak": 9.0, "kept": 8.0}  # fmt: skip
  return {"system": system, "length": 8192, "batch": 1, "round": i,
          **found, **changes}  # fmt: skip


def test_ratios_are_of_rounds_and_goals_are_told():
  rows = [
    row("transformers", 0, decode=1.0), row("tokjax", 0),
    row("transformers", 1, decode=2.0, prefill=3.0), row("tokjax", 1),
    row("transformers", 2, decode=9.0, prefill=1.1),
    row("tokjax", 2, decode=3.0),
    row("tokjax snapkv", 0, decode=0.4),
    {**row("kvpress snapkv", 0), "skipped": "it is not installed"},
  ]  # fmt: skip
  where = ("system", "length", "batch", "round", "skipped")
  rows[-1] = {name: rows[-1][name] for name in where}
  found = {r["system"]: r for r in bench_against.medians(rows)}
  assert found["tokjax"]["decode / transformers"] == 3  # of 2, 4 and 3
  assert found["tokjax"]["prefill / transformers"] == 1.1
  assert found["tokjax snapkv"]["decode / tokjax"] == 1.25  # of round 0
  text = bench_against.markdown(list(found.values()))
  assert "MISSED: prefill of tokjax 1.10x transformers's (goal 1.2)" in text
  assert "met: decode of tokjax 3.00x" in text
  assert "MISSED: decode of tokjax snapkv 1.25x tokjax's (goal 2)" in text
  assert "skipped, it is not installed" in text
  assert "| 8192 | 1 | tokjax | 1.00 | 1.10 | 500.0 | 9 | 8 |" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkpoint")
  checkpoints.write(
    folder, num_hidden_layers=1, max_position_embeddings=256
  )
  return str(folder)


def test_a_measurement_keeps_what_the_recipe_keeps(folder):
  case = Case("tokjax snapkv", folder, 140, 2, 3, keep=0.5)
  assert [len(p) for p in case.prompts(40)] == [140, 70]
  assert case.prompts(40) == case.prompts(40)
  found = measure(case)
  # Half of the first; of the second its window of 64, which is more.
  assert found["kept"] == 67
  for name in ("load", "cold", "prefill", "first", "decode"):
    assert found[name] > 0
  assert found["first"] > found["prefill"]
  assert found["peak"] is None or found["peak"] > 50


def test_what_is_not_there_is_skipped_with_the_reason(folder, tmp_path):
  case = Case("kvpress snapkv", folder, 8, 4)
  found = bench_against.run(case, str(tmp_path / "python"), 9)
  assert "No such file" in found["skipped"]
  (row,) = bench_against.bench([case], 1, str(tmp_path / "python"), tmp_path)
  assert "skipped" in row
  assert "No such file" in (tmp_path / "against.md").read_text()
  # Another time it may be there; padding is what kvpress cannot do.
  (row,) = bench_against.bench([case], 1, sys.executable, tmp_path)
  assert "one prompt only" in row["skipped"]
  with pytest.raises(ValueError, match="length=2, batch=4"):
    Case("tokjax", folder, 2, 4)
