"""What can be wrong with a checkpoint: a clear error, older ones untouched."""

import dataclasses
import gc
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import evaluate, train
from experiments.training import checkpoints, checksums, errors, rundir
from tests.experiments import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = [
  # Its tests share a run.
  pytest.mark.xdist_group("checkpoints"),
  # Orbax drops coroutines of other arrays when one cannot be read.
  pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
  ),
]


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
  yield tmp_path / "copy"
  gc.collect()  # Dropped coroutines complain here and in no later test.


def content(folder: pathlib.Path) -> dict[str, bytes]:
  files = (p for p in sorted(folder.rglob("*")) if p.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def state_files(step: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


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
  assert caught >= 3
  assert content(copy / "checkpoints" / "6") == older


def test_any_flipped_bit_is_an_error_or_harmless(copy, trained):
  """In every file of a step, arrays and others; never other values."""
  step = copy / "checkpoints" / "8"
  config = trained[1].config.to_dict()
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained[1].state)
  _, position = restored(copy, shapes, config)
  places = random.Random(0)
  caught = 0
  largest = max(state_files(step), key=lambda path: path.stat().st_size)
  for path in state_files(step):
    whole = path.read_bytes()
    for _ in range(8 if path == largest else 1):
      bad = bytearray(whole)
      bad[places.randrange(len(bad))] ^= 1 << places.randrange(8)
      path.write_bytes(bad)
      try:
        state, at = restored(copy, shapes, config)
      except checkpoints.CheckpointError as error:
        caught += 1
        assert str(step) in str(error)
      else:
        tiny.assert_same(state, trained[1].state)
        assert at == position
    path.write_bytes(whole)
  assert caught >= 8


def restored(workdir: pathlib.Path, shapes, config):
  saved = checkpoints.Checkpoints(workdir, read_only=True)
  try:
    return saved.restore(8, shapes, config)
  finally:
    saved.close()


def test_damaged_arrays_are_named(copy, trained, monkeypatch):
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained[1].state)
  whole = checksums.inspect
  monkeypatch.setattr(
    checksums, "inspect", lambda tree: (whole(tree)[0] | {"step": 1}, [])
  )
  with pytest.raises(checkpoints.CheckpointError) as error:
    restored(copy, shapes, trained[1].config.to_dict())
  state = copy / "checkpoints" / "8" / "state"
  assert f"{state} is damaged" in str(error.value)
  assert "step is not what was saved" in str(error.value)
  assert "continue from step 6" in str(error.value)


def test_checksums_find_any_bit_and_any_order():
  x = np.arange(24, dtype=np.float32).reshape(4, 6)
  flipped, swapped = x.copy(), x[::-1].copy()
  flipped.view(np.uint32)[2, 3] ^= 1 << 31
  mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
  over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
  tree = dict(
    x=jnp.asarray(x), again=jax.device_put(x, over),
    flipped=jnp.asarray(flipped), swapped=jnp.asarray(swapped),
    bits=jnp.asarray(x, jnp.bfloat16), flag=jnp.ones(3, bool),
    bad=jnp.asarray([1.0, jnp.nan]),
  )  # fmt: skip
  sums, diverged = checksums.inspect(tree)
  assert sums["x"] == sums["again"]
  assert len({sums[k] for k in ("x", "flipped", "swapped", "bits")}) == 4
  assert diverged == ["bad"]


@pytest.mark.parametrize(
  "file, content",
  [
    ("meta/metadata", b"[1, 2]"),
    ("meta/metadata", b'{"format": "tokjax training state 2"}'),
    ("meta/metadata", b"\xff\xfe"),
    ("data/metadata", b'{"next_index": 3}'),
  ],
)
def test_damage_outside_the_arrays_says_which(file, content, copy):
  path = copy / "checkpoints" / "8" / file
  assert path.is_file()
  path.write_bytes(content)
  with pytest.raises(checkpoints.CheckpointError, match="continue from step 6"):
    train.main(tiny.light(), copy)


def test_damaged_row_is_named(copy):
  path = copy / "metrics.jsonl"
  lines = path.read_text().splitlines()
  for bad in ("[]", '{"step": 3}', '{"step": "3", "split": "train"}', "{"):
    path.write_text("\n".join([lines[0], bad, *lines[2:], ""]))
    with pytest.raises(checkpoints.CheckpointError, match="line 2 is damaged"):
      train.main(tiny.light(), copy)


def test_checkpoints_without_checksums_are_read(copy, trained):
  """As they were written before there were any."""
  path = copy / "checkpoints" / "8" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  old = {"format": "tokjax training state 1", "config": meta["config"]}
  path.write_text(json.dumps(old))
  shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained[1].state)
  state, _ = restored(copy, shapes, meta["config"])
  tiny.assert_same(state, trained[1].state)


def test_a_second_run_in_one_workdir_is_refused(copy):
  before = content(copy)
  with rundir.locked(copy):
    with pytest.raises(errors.WorkdirError, match=f"process {os.getpid()} on"):
      train.main(tiny.light(), copy)
  after = content(copy)
  after.pop("lock")
  assert after == {k: v for k, v in before.items() if k != "lock"}


@pytest.mark.parametrize("kind", ["file", "empty", "under a file"])
def test_what_is_no_workdir(kind, tmp_path):
  (tmp_path / "file").write_text("")
  path = {
    "file": tmp_path / "file", "empty": "",
    "under a file": tmp_path / "file" / "run",
  }[kind]  # fmt: skip
  with pytest.raises(errors.WorkdirError, match="workdir='"):
    train.main(tiny.light(), path)


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


def test_a_run_is_trained_longer_in_its_directory_but_not_shorter(
  copy, capsys
):
  assert train.main(tiny.light(steps=10), copy).finished
  assert sorted(tiny.rows(copy)) == list(range(1, 11))
  assert "10 steps, 8 when this run was last started" in capsys.readouterr().out
  with pytest.raises(checkpoints.CheckpointError, match="steps: 10 in the"):
    train.main(tiny.light(), copy)


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
  assert "READABLE" in done.stdout, done.stderr[-2000:]
  assert int(done.stdout.rpartition("READABLE")[2]) >= 1
  # It is noticed while the next steps run, not when the next one is due.
  reached = int(re.findall(r"^step (\d+)/", done.stdout, re.MULTILINE)[-1])
  named = re.search(r"(?:step (\d+)|the run) could not be written", done.stdout)
  assert named, done.stdout[-2000:]
  if named[1]:
    assert int(named[1]) <= reached < int(named[1]) + 100
  # Else a row of metrics met the end of the disk before the checkpoint did.
