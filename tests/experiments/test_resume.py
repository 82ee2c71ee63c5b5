"""A run that is stopped and started again is the run that was not."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from experiments import train
from experiments.training import preemption
from tests.experiments import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Its tests share a run.
pytestmark = pytest.mark.xdist_group("resume")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run without interruption."""
  workdir = tmp_path_factory.mktemp("whole")
  return train.main(tiny.config(), workdir), workdir


def stop_at(monkeypatch, steps) -> None:
  """As SIGTERM would; () is never."""
  reached = lambda _, step: step in steps
  monkeypatch.setattr(preemption.Preemption, "reached", reached)


def test_stopped_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
  """Stopped after the first step, at a checkpoint and between two."""
  reference, directory = whole
  for at in (1, 4, 7):
    stop_at(monkeypatch, {at})
    part = train.main(tiny.config(), tmp_path)
    assert not part.finished and int(part.state.step) == at
    # What a killed run wrote after its last checkpoint.
    with (tmp_path / "metrics.jsonl").open("a") as f:
      row = {"step": at + 1, "split": "train", "loss": 99.0}
      f.write(json.dumps(row) + f'\n{{"step": {at + 2}, "sp')
  stop_at(monkeypatch, ())
  last = train.main(tiny.config(), tmp_path)
  assert last.finished
  tiny.assert_same(reference.state, last.state)
  assert sorted(tiny.rows(tmp_path)) == list(range(1, 9))
  assert tiny.losses(directory) == tiny.losses(tmp_path)
  assert reference.metrics == last.metrics


def test_finished_run_only_evaluates(whole):
  reference, directory = whole
  again = train.main(tiny.config(), directory)
  assert again.metrics == reference.metrics
  tiny.assert_same(reference.state, again.state)


def test_launches_and_config_are_recorded(whole):
  _, directory = whole
  config = json.loads((directory / "config.json").read_text())
  assert config["model"]["name"] == "vit" and config["optimizer"]["b1"] == 0.9
  launch = json.loads(
    (directory / "launches.jsonl").read_text().splitlines()[0]
  )
  assert launch["versions"]["jax"] and launch["command"]
  assert "parameters" in (directory / "parameters.txt").read_text()
  assert list((directory / "tensorboard").iterdir())


def test_sigterm_saves_and_exits_with_zero(tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    "import ml_collections\nfrom tests.experiments import tiny\n"
    "def get_config():\n"
    "  return ml_collections.ConfigDict(tiny.light(steps=100000,"
    " checkpoint=dict(every=100000)))\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.train", f"--config={config}",
     f"--workdir={tmp_path / 'run'}"],
    cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  for line in process.stdout:
    if line.startswith("step 3/"):
      break
  process.send_signal(signal.SIGTERM)
  rest, _ = process.communicate(timeout=120)
  assert process.returncode == 0, rest
  assert "SIGTERM: saved step" in rest
  (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
  assert int(saved.name) == max(tiny.rows(tmp_path / "run"))
