"""The benchmark of block-sparse attention in its short form."""

import json

import numpy as np
import pytest

from bench import candidates, flex, limits
from configs.bench import block_sparse
from experiments import benchmark
from experiments.bench import report
from experiments.typed import ConfigError
from pallas_kernels import layout as layouts


@pytest.fixture(scope="module")
def short(tmp_path_factory):
  """One direction, and a machine that need not be measured."""
  workdir = tmp_path_factory.mktemp("benchmark")
  with pytest.MonkeyPatch.context() as patch:
    machine = limits.Machine("test", 1e12, 1e11)
    patch.setattr(limits, "measure", lambda dtype: machine)
    result = benchmark.main(block_sparse.get_config("runlocal"), workdir)
  return result, workdir


def test_it_writes_rows_and_a_plot(short):
  result, workdir = short
  assert json.loads((workdir / "benchmark.json").read_text()) == result
  assert (workdir / "benchmark.png").stat().st_size > 10_000
  names = {(row["direction"], row["name"]) for row in result["rows"]}
  assert names == {
    ("forward", "dense"),
    ("forward", "planned"),
    ("forward", "attention"),
    ("forward", "plan"),
    ("backward", "dense"),
    ("backward", "attention"),
  }
  assert {row["name"] for row in result["unavailable"]} == {"flex"}


def test_numbers_of_a_row_follow_from_its_seconds(short):
  rows = {(r["direction"], r["name"]): r for r in short[0]["rows"]}
  row, dense = rows["forward", "attention"], rows["forward", "dense"]
  assert row["density"] == 0.5
  flops = 4 * 2 * 64 * 64 * 8 * 0.5
  assert row["tflops"] == pytest.approx(flops / row["seconds"] / 1e12)
  assert row["peak_share"] == pytest.approx(row["tflops"])
  assert row["speedup"] == pytest.approx(dense["seconds"] / row["seconds"])
  assert dense["speedup"] == 1
  moved = 2 * 64 * (2 + 1) * 8 * 4
  limit = max(flops / 1e12, moved / 1e11)
  assert row["limit_share"] == pytest.approx(limit / row["seconds"])
  assert rows["forward", "plan"]["tflops"] is None


def test_rows_that_lack_dense_are_drawn_too(short, tmp_path):
  rows = [r | {"speedup": None} for r in short[0]["rows"]]
  rows = [r for r in rows if r["name"] != "dense"]
  report.draw(rows, tmp_path / "plot.png", title="no dense", peak=1e12)
  report.show(rows)
  assert (tmp_path / "plot.png").exists()


def test_splash_says_where_it_runs_and_flex_takes_full_blocks_only():
  with pytest.raises(candidates.Unavailable, match="runs on a TPU"):
    candidates.splash(None, "forward", 128)
  pytest.importorskip("torch")
  layout = layouts.full(q_len=64, k_len=64, block_q=16, block_k=16)
  mask = flex.block_mask(layout, "cpu")
  assert np.all(mask.to_dense().numpy() == 1)
  causal = layouts.from_pattern(
    layouts.Causal(), q_len=64, block_q=16, block_k=16
  )
  with pytest.raises(ValueError, match="partial blocks"):
    flex.block_mask(causal, "cpu")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"key_heads": 3}, "key_heads=3: must divide heads=16"),
    ({"estimator": "guess"}, "estimator='guess': must be one of"),
    ({"opponents": ("fa5",)}, "'fa5' is none of"),
    ({"densities": (0.0,)}, "0.0 is not in"),
  ],
)
def test_wrong_configs_name_what_is_wrong(change, message):
  config = block_sparse.get_config().to_dict() | change
  with pytest.raises(ConfigError, match=message):
    benchmark.load(config)


def test_the_full_form_builds():
  for arg in ("", "cpu"):
    assert benchmark.load(block_sparse.get_config(arg)).densities[-1] == 1
