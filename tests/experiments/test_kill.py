"""SIGKILL at any moment: the run goes on from the last complete checkpoint."""

import pathlib
import random
import signal
import time

import pytest

from tests.experiments import tiny
from tests.experiments.fork_server import Child

# More of them, and other damage: scripts/fuzz.py.
KILLS = 12
CONFIG = tiny.light(
  steps=160, checkpoint=dict(every=2, keep=3), log_every=1, eval_every=9999
)


def complete(workdir: pathlib.Path) -> list[int]:
  """Steps whose checkpoints have their final name."""
  found = (workdir / "checkpoints").glob("*")
  return sorted(int(p.name) for p in found if p.name.isdigit())


def progress(child: Child, workdir: pathlib.Path) -> float:
  """Seconds until a child's first new checkpoint, or until it ends."""
  before, began = complete(workdir), time.monotonic()
  while complete(workdir) == before and child.poll() is None:
    time.sleep(0.001)
  return time.monotonic() - began


def killed(child: Child, seconds: float) -> int:
  """Exit status of a child killed after so long."""
  time.sleep(seconds)
  child.send(signal.SIGKILL)
  return child.wait()


@pytest.mark.slow
def test_killed_again_and_again_and_nothing_is_lost(fork_server, tmp_path):
  """By turns among the steps and at any moment of starting or resuming."""
  moments = random.Random(0)
  workdir, last, start = tmp_path / "killed", 0, 0.0
  for kill in range(KILLS):
    child = fork_server.run(workdir, CONFIG)
    if kill % 2:
      # As long as this machine needs, so that a fast one does not finish.
      status = killed(child, moments.uniform(0, 1.2) * start)
    else:
      start = progress(child, workdir)
      status = killed(child, moments.uniform(0, 0.1))
    assert status != 0, f"the run ended after {kill} kills"
    assert status == -signal.SIGKILL, child.output
    steps = complete(workdir)
    assert not last or steps[-1] >= last, "a complete checkpoint was lost"
    last = steps[-1] if steps else 0
  assert last < 160
  child = fork_server.run(workdir, CONFIG)
  assert child.wait() == 0, child.output
  child = fork_server.run(tmp_path / "whole", CONFIG)
  assert child.wait() == 0, child.output
  for split in ("train", "heldout"):
    expected = tiny.rows(tmp_path / "whole", split)
    found = tiny.rows(workdir, split)
    assert expected.keys() == found.keys()
    for step, row in expected.items():
      assert row["loss"] == found[step]["loss"]
