"""Points, seeds, and what a runner makes of their rows."""

import csv
import math
import pathlib

import pytest

from experiments import command, runner, seeds, train
from experiments.sweeps import results
from experiments.training import rundir
from experiments.typed import ConfigError
from tests.experiments import tiny

CONFIG = '''
import ml_collections

def get_config():
  return ml_collections.ConfigDict({"steps": 2})
'''
SWEEP = '''
def sweep():
  yield {"recipe.keep": 0.5}
  yield {"recipe.keep": 0.25}
'''


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(CONFIG)
  return path


def fake(config, point, workdir):
  """A finished row without a run; seed 2 fails at keep 0.25."""
  row = {**point, "folder": runner.folder_name(point), "status": 0}
  if point.get("recipe.keep") == 0.25 and point["seed"] == 2:
    return {**row, "status": 1, "error": "stopped"}
  return {**row, "step": 2, "accuracy": 0.5 + 0.1 * point["seed"], "loss": 1.0}


def test_a_config_alone_is_one_point_that_many_times(config):
  assert list(runner.points(str(config), 2)) == [{"seed": 0}, {"seed": 1}]
  with pytest.raises(ValueError, match=r"no function sweep.*--seeds=N"):
    runner.points(str(config))
  with pytest.raises(ValueError, match="seeds=0: must be 1 or more"):
    runner.points(str(config), 0)


def test_a_point_that_sets_its_seed_is_not_repeated():
  with pytest.raises(ValueError, match="sets seed=3 itself"):
    list(seeds.times([{"seed": 3}], 2))


def test_mean_and_deviation_of_what_finished(
  config, tmp_path, monkeypatch, capsys
):
  config.write_text(CONFIG + SWEEP)
  monkeypatch.setattr(runner, "run_point", fake)
  out = tmp_path / "out"
  changes = {"optimizer.lr": 0.1}
  rows = runner.main(str(config), out, 2, seeds=3, changes=changes)
  assert [row["seed"] for row in rows] == [0, 1, 2] * 2
  assert {row["optimizer.lr"] for row in rows} == {0.1}
  seeds.report(rows, list(runner.points(str(config), 3)), out)
  with (out / "seeds.csv").open() as file:
    half, quarter = csv.DictReader(file)
  assert (half["seeds"], quarter["seeds"]) == ("3", "2")
  assert float(half["accuracy"]) == pytest.approx(0.6)
  assert float(half["accuracy_std"]) == pytest.approx(0.1)
  assert float(quarter["accuracy"]) == pytest.approx(0.55)
  assert float(quarter["accuracy_std"]) == pytest.approx(0.1 / math.sqrt(2))
  assert "step" not in half and "status" not in half
  assert "keep=0.25" in capsys.readouterr().out
  assert (out / "seeds.png").stat().st_size > 1000


def test_points_without_a_result_are_in_the_table(config, tmp_path, capsys):
  point = {"recipe.keep": 0.25, "seed": 2}
  seeds.report([fake("", point, tmp_path)], [point], tmp_path)
  assert "keep=0.25" in capsys.readouterr().out
  assert not (tmp_path / "seeds.png").exists()


def test_runs_of_one_device_share_programs(monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  name = "JAX_COMPILATION_CACHE_DIR"
  assert name not in runner.environment(pathlib.Path("runs"))
  monkeypatch.setenv("XLA_FLAGS", "")
  assert runner.environment(pathlib.Path("runs"))[name] == "runs/programs"
  monkeypatch.setenv(name, "mine")
  assert runner.environment(pathlib.Path("runs"))[name] == "mine"


def test_addresses_are_refused_and_make_no_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(rundir.WorkdirError, match="gs://b/run.*local directory"):
    train.main(tiny.light(), "gs://b/run")
  with pytest.raises(ConfigError, match="gs://b/run.*local directory"):
    results.writable("gs://b/run", "workdir")
  assert not list(tmp_path.iterdir())


def test_shipped_configs_are_found_from_everywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert command.read("configs/digits.py").steps
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "digits.py").write_text(CONFIG)
  assert command.read("configs/digits.py").to_dict() == {"steps": 2}
