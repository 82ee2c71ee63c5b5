"""Runs the points of a sweep, some at a time, each in its own folder.

python -m experiments.runner --config configs/digits.py --workdir DIR \\
  --workers 2
python -m experiments.runner --config configs/learned/evit.py --workdir DIR \\
  --seeds 3

A config module may have a function `sweep()`, which yields flat overrides such
as `{"recipe.name": "tome", "optimizer.lr": 1e-3}`; each is a point. With
`--seeds` every point, or the config itself, is trained that many times. Points
that have finished are not run again; others go on from their checkpoint.
`DIR/results.json` and `DIR/results.csv` have one row for every run, and with
`--seeds` `DIR/seeds.csv` and `DIR/seeds.png` mean and deviation of every point.
Runs use each other's compiled programs. Those under way save and stop when the
runner ends, killed or not.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import rich.console
import rich.progress

from experiments import seeds as seeds_lib
from experiments.command import load_module
from experiments.training import config as config_lib
from experiments.training import rows as rows_lib
from experiments.training import rundir
from experiments.training.errors import CheckpointError

ROOT = pathlib.Path(__file__).resolve().parents[1]
Point = Mapping[str, Any]


def points(config: str, seeds: int | None = None) -> Iterator[Point]:
  """The overrides that `sweep()` of a config file yields.

  Args:
    config: a file, `FILE.py` or `FILE.py:ARGUMENT`.
    seeds: each of them so many times, with "seed" from 0 on; a file without
      `sweep` is one point then. None: as they are.

  Raises:
    ValueError: the file has no `sweep`, a point sets the seed that `seeds`
      sets, or the file cannot be run.
    FileNotFoundError: there is none.
  """
  path = config.partition(":")[0]
  module = load_module(path)
  if seeds is None:
    if not hasattr(module, "sweep"):
      raise ValueError(
        f"{path}: has no function sweep(); --seeds=N trains the config itself"
        " N times"
      )
    return iter(module.sweep())
  if seeds < 1:
    raise ValueError(f"seeds={seeds}: must be 1 or more")
  return seeds_lib.times(getattr(module, "sweep", lambda: [{}])(), seeds)


def folder_name(point: Point) -> str:
  """`keep=0.8,name=tome-1f2e3d4c`: readable, and different for all points."""
  text = json.dumps(dict(sorted(point.items())), default=str)
  short = ",".join(
    f"{key.rpartition('.')[2]}={value}" for key, value in sorted(point.items())
  )
  safe = "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in short)
  return f"{safe[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def command(config: str, point: Point, folder: pathlib.Path) -> list[str]:
  """What runs one point, in whatever folder it is called."""
  path, *argument = config.split(":", 1)
  if (here := pathlib.Path(path)).is_file():
    config = ":".join([str(here.resolve()), *argument])
  overrides = [f"--config.{key}={value}" for key, value in point.items()]
  train = [sys.executable, "-m", "experiments.train"]
  return [*train, f"--config={config}", f"--workdir={folder}", *overrides]


def run_point(
  config: str, point: Point, workdir: pathlib.Path
) -> dict[str, Any]:
  """One row of the table; trains unless that has been done.

  The process writes to `log.txt` in its folder, next to the checkpoints.
  """
  folder = workdir / folder_name(point)
  done = folder / "row.json"
  if done.exists():
    return _finished(done)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "log.txt").open("a") as log:
    status = subprocess.run(
      [*command(config, point, folder), f"--parent={os.getpid()}"], cwd=ROOT,
      stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
      env=environment(workdir),
    ).returncode  # fmt: skip
  row = {**point, "folder": folder.name, "status": status}
  if status:
    tail = (folder / "log.txt").read_text().strip().splitlines()[-1:]
    return {**row, "error": "".join(tail)}
  found = results(folder)
  if found is None:  # A signal stopped it in good order.
    return {**row, "status": 1, "error": "stopped; start again to go on"}
  row |= found
  part = folder / "row.json.part"
  part.write_text(json.dumps(row))
  part.replace(done)
  return row


def environment(workdir: pathlib.Path) -> dict[str, str]:
  """Of a run: programs that another one compiled are read from `programs`.

  A folder that is set by `JAX_COMPILATION_CACHE_DIR` stays.
  """
  shared = rundir.shared_programs(workdir)
  return {**{k.upper(): str(v) for k, v in shared.items()}, **os.environ}


def _finished(done: pathlib.Path) -> dict[str, Any]:
  try:
    row = json.loads(done.read_text())
  except (ValueError, RecursionError):
    row = None
  if not isinstance(row, dict) or "status" not in row:
    raise CheckpointError(
      f"{done}: is damaged; remove that file to evaluate the point again"
    )
  return row


def results(folder: pathlib.Path) -> dict[str, Any] | None:
  """The last held-out metrics, and cost and speed of the last step.

  None: the run has not reached its end.

  Raises:
    CheckpointError: a damaged row, see `rows.read`.
  """
  rows = rows_lib.read(folder / rows_lib.NAME)
  steps = json.loads((folder / "config.json").read_text())["steps"]
  ends = [r for r in rows if r["split"] == "heldout" and r["step"] == steps]
  if not ends:
    return None
  out = {}
  for split, keys in (
    ("heldout", None),
    ("train", ("gflops_per_step", "images_per_second", "tokens_per_second")),
  ):
    last = [row for row in rows if row["split"] == split][-1]
    out |= {k: v for k, v in last.items() if keys is None or k in keys}
  out.pop("split")
  return out


def write_table(rows: list[dict[str, Any]], workdir: pathlib.Path) -> None:
  """`results.json` and `results.csv`."""
  (workdir / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
  rows_lib.write_csv(workdir / "results.csv", rows)


def main(
  config: str,
  workdir: str | pathlib.Path,
  workers: int = 1,
  *,
  seeds: int | None = None,
  changes: Point | None = None,
) -> list[dict[str, Any]]:
  """Runs all points; rows come in the order of `sweep()`.

  A point that fails does not stop the others: its row has "error".

  Args:
    config: a file, `FILE.py` or `FILE.py:ARGUMENT`.
    workdir: everything is written under it.
    workers: runs at a time.
    seeds: how often each point is trained; see `points`.
    changes: settings of every point; what a point sets itself wins.

  Raises:
    ValueError: no worker, no seed, or a config without points.
    WorkdirError: another runner uses the directory, or it cannot be one.
  """
  if workers < 1:
    raise ValueError(f"workers={workers}: must be 1 or more")
  asked = list(points(config, seeds))
  todo = [{**(changes or {}), **point} for point in asked]
  workdir = rundir.make(workdir).resolve()
  rows: dict[int, dict[str, Any]] = {}
  with (
    rundir.lock(workdir),
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
    rich.progress.Progress(console=rich.console.Console(stderr=True)) as bar,
  ):
    task = bar.add_task("points", total=len(todo))
    futures = {
      pool.submit(run_point, config, point, workdir): i
      for i, point in enumerate(todo)
    }
    try:
      for future in concurrent.futures.as_completed(futures):
        rows[futures[future]] = future.result()
        write_table([rows[i] for i in sorted(rows)], workdir)
        bar.advance(task)
    except BaseException:
      # Interrupted, or a damaged row: what has not begun does not begin.
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  made = [rows[i] for i in sorted(rows)]
  if seeds is not None:
    seeds_lib.report(made, asked, workdir)
  return made


def from_command_line(given: Any) -> None:
  """`main` with the options of the command; exits with 1 if a run failed."""
  changes = dict(given.changes)
  if given.dry_run:
    for point in points(given.config, given.seeds):
      point = {**changes, **point}
      folder = pathlib.Path(given.workdir) / folder_name(point)
      print(*command(given.config, point, folder))
    return
  rows = main(
    given.config, given.workdir, given.workers, seeds=given.seeds,
    changes=changes,
  )  # fmt: skip
  failed = [row for row in rows if row["status"]]
  for row in failed:
    print(f"failed: {row['folder']}: {row['error']}")
  sys.exit(bool(failed))


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      __doc__ or "",
      (
        Option("config", str, None, "FILE.py or FILE.py:ARGUMENT.", True),
        launch.workdir(),
        Option("workers", int, 1, "Runs at a time."),
        Option("seeds", int, None, "Train each point so often."),
        Option("dry_run", bool, False, "Print the commands; run nothing."),
        Option("traceback", bool, False, "Show where an error comes from."),
      ),
      (config_lib.Config,),
      reads_file=False,
    ),
    from_command_line,
  )
