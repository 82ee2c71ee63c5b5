"""What can be wrong with a checkpoint: a clear error, older ones untouched."""

import dataclasses
import gc
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import orbax.checkpoint as ocp
import pytest

from experiments import evaluate, train
from experiments.training import checkpoints
from tests.experiments import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Its tests share a run.
pytestmark = pytest.mark.xdist_group("checkpoints")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run with checkpoints at steps 6 and 8."""
  workdir = tmp_path_factory.mktemp("trained")
  run = train.main(tiny.light(), workdir)
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [
    "6",
    "8",
  ]
  return workdir, run


@pytest.fixture
def copy(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / "copy")
  return tmp_path / "copy"


def content(folder: pathlib.Path) -> dict[str, bytes]:
  files = (p for p in sorted(folder.rglob("*")) if p.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def state_files(step: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


# Orbax drops coroutines of other arrays when one cannot be read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["cut", "remove"])
def test_damaged_file_is_an_error_or_harmless(harm, copy, trained):
  older = content(copy / "checkpoints" / "6")
  step = copy / "checkpoints" / "8"
  run = trained[1]
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, run.state)
  config = run.config.to_dict()
  caught = 0
  for path in state_files(step):
    whole = path.read_bytes()
    if harm == "cut":
      path.write_bytes(whole[: len(whole) // 2])
    else:
      path.unlink()
    saved = checkpoints.Checkpoints(copy, read_only=True)
    try:
      state, _ = saved.restore(8, shapes, config)
    except checkpoints.CheckpointError as error:
      caught += 1
      assert str(step) in str(error)
      assert "continue from step 6" in str(error)
    else:
      tiny.assert_same(state, run.state)
    saved.close()
    path.write_bytes(whole)
  gc.collect()  # Dropped coroutines complain here and in no later test.
  assert caught >= 3
  assert content(copy / "checkpoints" / "6") == older


def test_removing_the_damaged_step_goes_on_from_the_older_one(copy, trained):
  shutil.rmtree(copy / "checkpoints" / "8")
  run = train.main(tiny.light(), copy)
  tiny.assert_same(run.state, trained[1].state)


def test_foreign_checkpoint(copy):
  shutil.rmtree(copy / "checkpoints" / "8")
  foreign = copy / "checkpoints" / "9"
  (foreign / "default").mkdir(parents=True)
  (foreign / "default" / "weights.bin").write_bytes(b"1234")
  before = content(copy / "checkpoints")
  with pytest.raises(checkpoints.CheckpointError, match="not a checkpoint of"):
    train.main(tiny.light(), copy)
  assert content(copy / "checkpoints") == before


def test_other_config_lists_what_differs(copy):
  before = content(copy / "checkpoints")
  other = tiny.light(seed=1, optimizer=dict(lr=2e-3, warmup=2, ema=0.9))
  with pytest.raises(checkpoints.CheckpointError) as error:
    train.main(other, copy)
  assert "seed: 0 in the checkpoint, 1 now" in str(error.value)
  assert "optimizer.lr: 0.001 in the checkpoint, 0.002 now" in str(error.value)
  assert "batch_size" not in str(error.value)
  assert content(copy / "checkpoints") == before


def test_other_shapes_are_listed(copy, trained):
  state = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained[1].state)
  state = dataclasses.replace(state, step=jax.ShapeDtypeStruct((2,), "float32"))
  saved = checkpoints.Checkpoints(copy)
  with pytest.raises(checkpoints.CheckpointError) as error:
    saved.restore(8, state, saved.config(8))
  saved.close()
  assert str(error.value).splitlines()[1:] == [
    "  step: ((), 'int32') in the checkpoint, ((2,), 'float32') now"
  ]


def test_what_may_change_does_not_matter(copy, trained):
  config = tiny.light(log_every=3, checkpoint=dict(every=5, keep=1), threads=2)
  run = train.main(config, copy)
  tiny.assert_same(run.state, trained[1].state)


def test_evaluation_reads_the_averaged_parameters(trained):
  workdir, run = trained
  metrics = evaluate.main(workdir)
  assert metrics.pop("step") == 8
  assert metrics == pytest.approx(run.metrics, rel=1e-5)


def test_nothing_to_evaluate(tmp_path):
  with pytest.raises(checkpoints.CheckpointError, match="does not exist"):
    evaluate.main(tmp_path / "absent")


FULL = """
import pathlib, sys
from experiments import train
from experiments.training import checkpoints
from tests.experiments import tiny
workdir = pathlib.Path(sys.argv[1])
config = tiny.light(steps=4000, checkpoint=dict(every=100, keep=40))
try:
  train.main(config, workdir)
except checkpoints.CheckpointError as error:
  print("ERROR", error)
names = [p.name for p in (workdir / "checkpoints").glob("*")]
steps = [int(name) for name in names if name.isdigit()]
for path in workdir.glob("*"):
  if path.name != "checkpoints" and path.is_file():
    path.unlink()
saved = checkpoints.Checkpoints(workdir, read_only=True)
for step in sorted(steps):
  saved.restore_params(step, None)
print("READABLE", len(steps))
"""


@pytest.mark.slow
def test_full_disk(tmp_path):
  """On a file system of half a megabyte."""
  mount = "mount -t tmpfs -o size=512k none {0} && exec {1} -c '{2}' {0}"
  probe = ["unshare", "-rm", "true"]
  if (
    shutil.which("unshare") is None
    or subprocess.run(probe, check=False).returncode
  ):
    pytest.skip("needs the right to mount a file system of its own")
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = mount.format(tmp_path, sys.executable, FULL)
  done = subprocess.run(
    ["unshare", "-rm", "sh", "-c", command], cwd=ROOT, env=env, text=True,
    capture_output=True, timeout=120, check=False,
  )  # fmt: skip
  assert "ERROR" in done.stdout, done.stderr[-2000:]
  assert "could not be written" in done.stdout
  assert "Older checkpoints are as they were" in done.stdout
  assert int(done.stdout.rpartition("READABLE")[2]) >= 1
  # It is noticed while the next steps run, not when the next one is due.
  reached = int(re.findall(r"^step (\d+)/", done.stdout, re.MULTILINE)[-1])
  failed = int(re.search(r"step (\d+) could not be written", done.stdout)[1])
  assert failed <= reached < failed + 100
