"""Every shipped config, in its `runlocal` form: two steps, resume, evaluate."""

import importlib.util
import pathlib

import pytest
import tensorflow_datasets as tfds

from experiments import evaluate, train
from experiments.data import DataError
from experiments.training import config as config_lib
from experiments.training import preemption
from tests.experiments import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]


def shipped() -> list[pathlib.Path]:
  """Configs of the loop: files whose `get_config` names a model and a task."""
  found = []
  for path in sorted((ROOT / "configs").rglob("*.py")):
    module = load(path)
    if hasattr(module, "get_config") and "task" in module.get_config():
      found.append(path)
  return found


def load(path: pathlib.Path):
  """The module of a config file."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


CONFIGS = shipped()


def test_there_are_configs():
  assert {"digits", "cifar", "imagenet", "text"} <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_full_form_builds(path):
  config = config_lib.load(load(path).get_config())
  assert config.build_model().config == config.model
  assert config_lib.load(config.to_dict()) == config


# Methods that are learned share models and data: one in an encoder and one in
# a decoder are run here, all of them by `scripts/smoke.py`.
RUN = [
  path
  for path in CONFIGS
  if path.parent.name != "learned" or path.stem in ("pyra", "cca")
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_two_steps_resume_evaluate(path, tmp_path, monkeypatch):
  config = load(path).get_config("runlocal")
  assert config.steps == 2
  stop = lambda _, step: step == 1
  with tfds.testing.mock_data(num_examples=24):
    with monkeypatch.context() as patch:
      patch.setattr(preemption.Preemption, "reached", stop)
      assert not train.main(config, tmp_path).finished
    run = train.main(config, tmp_path)
    metrics = evaluate.main(tmp_path)
  assert run.finished and sorted(tiny.rows(tmp_path)) == [1, 2]
  assert metrics.pop("step") == 2
  assert metrics == pytest.approx(run.metrics, rel=1e-3)


@pytest.mark.parametrize("name", ["cifar", "imagenet"])
def test_unprepared_data_names_the_command(name, tmp_path):
  config = load(ROOT / "configs" / f"{name}.py").get_config(
    f"data_dir={tmp_path / 'nothing'},runlocal"
  )
  with pytest.raises(DataError) as error:
    train.main(config, tmp_path / "run")
  assert "python -m experiments.data.tfds_source --builder" in str(error.value)
  assert str(tmp_path / "nothing") in str(error.value)
  assert not (tmp_path / "run" / "checkpoints").exists()
