"""Signals, a closed pipe, a killed runner: nothing ends without saving."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
STARTED: list[subprocess.Popen] = []
LONG = """
import ml_collections
from tests.experiments import tiny

def get_config():
  return ml_collections.ConfigDict(
    tiny.light(steps=100000, checkpoint=dict(every=100000))
  )

def sweep():
  yield {"steps": 100000}
  yield {"steps": 100001}
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(LONG)
  return path


@pytest.fixture(autouse=True)
def no_leaks():
  yield
  for process in STARTED:
    process.kill()
    process.wait()
    process.stdout.close()
  STARTED.clear()


def start(module: str, *args: str) -> subprocess.Popen:
  STARTED.append(process := subprocess.Popen(
    [sys.executable, "-m", module, *args], cwd=ROOT, text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  ))  # fmt: skip
  return process


def saved_step(workdir: pathlib.Path) -> int:
  (saved,) = (workdir / "checkpoints").iterdir()
  return int(saved.name)


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    if (workdir / "metrics.jsonl").exists() and step in tiny.rows(workdir):
      return
    time.sleep(0.05)
  raise AssertionError(f"step {step} was not reached")


def test_a_run_outlives_its_reader_and_saves_at_sigint(config, tmp_path):
  """As in `train | head -1`, then Ctrl-C."""
  if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    pytest.skip("started where SIGINT is ignored (nohup, &), as children are")
  workdir = tmp_path / "run"
  run = start("experiments.train", f"--config={config}", f"--workdir={workdir}")
  run.stdout.readline()
  run.stdout.close()
  wait_for_step(workdir, 5)
  run.send_signal(signal.SIGINT)
  assert run.wait(120) == 0
  assert saved_step(workdir) == max(tiny.rows(workdir))


@pytest.mark.slow
def test_a_killed_runner_takes_its_runs_along(config, tmp_path):
  """They save; what has not begun does not begin."""
  runner = start(
    "experiments.runner", f"--config={config}", f"--workdir={tmp_path / 'all'}"
  )
  deadline = time.monotonic() + 120
  while not (found := list((tmp_path / "all").glob("*/metrics.jsonl"))):
    assert runner.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  (workdir,) = [path.parent for path in found]
  wait_for_step(workdir, 3)
  second = start(
    "experiments.runner", f"--config={config}", f"--workdir={tmp_path / 'all'}"
  )
  refused, _ = second.communicate(timeout=120)
  assert second.returncode == 1
  assert refused.startswith("error: workdir=") and refused.count("\n") == 1
  runner.kill()
  runner.wait()
  deadline = time.monotonic() + 60
  while "SIGTERM: saved step" not in (workdir / "log.txt").read_text():
    assert time.monotonic() < deadline, (workdir / "log.txt").read_text()
    time.sleep(0.1)
  assert saved_step(workdir) == max(tiny.rows(workdir))
