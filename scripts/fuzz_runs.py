"""Faults around runs: kills, damaged files, two runs at once."""

import functools
import gc
import pathlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import train
from experiments.training import checkpoints, rows
from experiments.training.errors import CheckpointError
from tests.experiments import tiny
from tests.experiments.fork_server import Child, ForkServer

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stage:
  """Cases of one kind; a subclass has `case`.

  Args:
    planted: whether to behave as if the programme had a fault.
  """

  def __init__(self, planted: bool):
    self.planted = planted
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))

  def case(self, rng: np.random.Generator) -> Iterator[str]:
    """Runs a case; yields what happened, raises what must not happen."""
    raise NotImplementedError

  def close(self) -> None:
    shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def fork_server() -> ForkServer:
  """One for all stages; it ends with this process."""
  return ForkServer().__enter__()


class Forking(Stage):
  """With a fork server."""

  def __init__(self, planted: bool):
    super().__init__(planted)
    self.server = fork_server()


class Kills(Forking):
  """Signals at any moment: nothing saved is lost, results stay the same."""

  CONFIG = tiny.light(
    steps=60, checkpoint=dict(every=2, keep=3), eval_every=9999
  )

  def __init__(self, planted: bool):
    super().__init__(planted)
    whole = self.folder / "whole"
    child = self.server.run(whole, self.CONFIG)
    began = time.monotonic()
    assert child.wait() == 0, child.output
    self.seconds = time.monotonic() - began
    self.expected = [tiny.rows(whole, split) for split in ("train", "heldout")]
    self.runs = 0

  def case(self, rng):
    workdir = self.folder / f"run{self.runs}"
    before = complete(workdir)
    child = self.server.run(workdir, self.CONFIG)
    time.sleep(rng.uniform(0, self.seconds))
    sent = SIGNALS[rng.integers(len(SIGNALS))]
    child.send(sent)
    status = child.wait()
    yield f"{signal.Signals(sent).name}"
    assert status in (0, -sent), f"status {status}\n{child.output}"
    if self.planted and complete(workdir):
      shutil.rmtree(workdir / "checkpoints" / str(complete(workdir)[-1]))
    after = complete(workdir)
    assert not before or after[-1] >= before[-1], f"{before} became {after}"
    finished = (workdir / "metrics.jsonl").exists() and tiny.rows(
      workdir, "heldout"
    )
    if finished:
      self.compare(workdir)
      self.runs += 1
      yield "finished and equal"

  def compare(self, workdir: pathlib.Path) -> None:
    splits = "train", "heldout"
    for expected, split in zip(self.expected, splits, strict=True):
      found = tiny.rows(workdir, split)
      assert found.keys() == expected.keys()
      for step, row in expected.items():
        assert row["loss"] == found[step]["loss"], f"step {step}"


class Damage(Stage):
  """Files of a run are harmed: an error that says which, or no effect."""

  def __init__(self, planted: bool):
    super().__init__(planted)
    self.workdir = self.folder / "run"
    # Wide, so that most bytes are those of arrays.
    model = {**tiny.light()["model"], "width": 64, "mlp_dim": 64}
    self.run = train.main(tiny.light(model=model), self.workdir)
    self.config = self.run.config.to_dict()
    self.shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.run.state)
    self.step = self.workdir / "checkpoints" / "8"
    self.position = self.restore()[1]
    self.rows = rows.read(self.workdir / rows.NAME)
    self.verify = checkpoints.Checkpoints._verify
    if planted:
      checkpoints.Checkpoints._verify = lambda *_: None

  def close(self) -> None:
    checkpoints.Checkpoints._verify = self.verify
    gc.collect()  # Orbax drops coroutines when it cannot read an array.
    super().close()

  def restore(self):
    saved = checkpoints.Checkpoints(self.workdir, read_only=True)
    try:
      return saved.restore(8, self.shapes, self.config)
    finally:
      saved.close()

  def case(self, rng):
    files = sorted(p for p in self.step.rglob("*") if p.is_file())
    files = [p for p in files if p.stat().st_size]
    # Half of all cases harm the largest file, the arrays.
    path = max(files, key=lambda p: p.stat().st_size)
    if rng.random() < 0.5:
      path = files[rng.integers(len(files))]
    harm = "flip" if self.planted else rng.choice([*HARMS])
    if rng.random() < 0.1 and harm != "remove":
      path = self.workdir / rows.NAME
    whole = path.read_bytes()
    HARMS[harm](path, whole, rng)
    try:
      state, position = self.restore()
      found = rows.read(self.workdir / rows.NAME)
    except CheckpointError as error:
      assert str(self.workdir) in str(error)
      yield f"{harm} refused"
    else:
      yield f"{harm} harmless"
      if path.name != rows.NAME:
        tiny.assert_same(state, self.run.state)
        assert position == self.position
        assert found == self.rows
    finally:
      path.write_bytes(whole)


def flip(path: pathlib.Path, whole: bytes, rng: np.random.Generator) -> None:
  """One bit."""
  bad = bytearray(whole)
  bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
  path.write_bytes(bad)


def cut(path: pathlib.Path, whole: bytes, rng: np.random.Generator) -> None:
  """The end is missing."""
  path.write_bytes(whole[: rng.integers(len(whole))])


def noise(path: pathlib.Path, whole: bytes, rng: np.random.Generator) -> None:
  """A random stretch is random."""
  start = int(rng.integers(len(whole)))
  count = min(int(rng.integers(1, 64)), len(whole) - start)
  path.write_bytes(whole[:start] + rng.bytes(count) + whole[start + count :])


def remove(path: pathlib.Path, *_) -> None:
  """The file is gone."""
  path.unlink()


HARMS = {"flip": flip, "cut": cut, "noise": noise, "remove": remove}


class Two(Forking):
  """Two runs in one workdir: the second is refused, the first goes on."""

  CONFIG = tiny.light(steps=10**6, checkpoint=dict(every=50, keep=2))

  def case(self, rng):
    workdir = self.folder / str(rng.integers(2**62))
    first = self.server.run(workdir, self.CONFIG)
    self.wait_for_step(workdir, first, int(rng.integers(1, 80)))
    other = workdir.with_name("other") if self.planted else workdir
    second = self.server.run(other, self.CONFIG)
    try:
      assert second.wait(60) == 1, second.output
      assert f"in use by process {first.pid}" in second.output
      yield "refused"
      assert first.poll() is None, first.output
    finally:
      second.send(signal.SIGKILL)
      first.send(signal.SIGTERM)
    assert first.wait() == 0, first.output
    assert complete(workdir)[-1] == max(tiny.rows(workdir))
    yield "saved"
    # The lock of a killed run does not block the next.
    third = self.server.run(workdir, self.CONFIG)
    self.wait_for_step(workdir, third, max(tiny.rows(workdir)) + 1)
    third.send(signal.SIGKILL)
    third.wait()

  def wait_for_step(self, workdir: pathlib.Path, child: Child, step: int):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
      if (workdir / rows.NAME).exists() and step in tiny.rows(workdir):
        return
      time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached\n{child.output}")


def complete(workdir: pathlib.Path) -> list[int]:
  """Steps whose checkpoints are complete."""
  found = (workdir / "checkpoints").glob("*")
  return sorted(int(p.name) for p in found if p.name.isdigit())


STAGES = {"kills": Kills, "damage": Damage, "two": Two}
