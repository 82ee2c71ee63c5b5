"""Runs of one setting with several seeds: mean and deviation."""

import math
import pathlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.sweeps.report import Table, show
from experiments.training import rows as rows_lib
from tokjax.analysis import dots

Point = Mapping[str, Any]
# Of a row, but not measured.
OTHER = ("seed", "status", "step", "folder", "error")
# What runs are compared by, the first that they have.
MEASURES = ("accuracy", "loss")


def times(points: Iterable[Point], seeds: int) -> Iterator[Point]:
  """Each point with "seed" 0, 1, ... in turn.

  Raises:
    ValueError: a point sets the seed itself.
  """
  for point in points:
    if "seed" in point:
      raise ValueError(
        f"seeds={seeds}: sweep() sets seed={point['seed']} itself; leave one"
        " of the two out"
      )
    for seed in range(seeds):
      yield {**point, "seed": seed}


def groups(
  rows: Sequence[Mapping[str, Any]], points: Sequence[Point]
) -> list[tuple[Point, list[Mapping[str, Any]]]]:
  """What was set, and the runs that finished, for each point.

  Args:
    rows: of runs, with "status" 0 if finished.
    points: what was set in each run, with "seed".
  """
  found: dict[tuple, list[Mapping[str, Any]]] = {}
  for row, point in zip(rows, points, strict=True):
    setting = tuple((k, v) for k, v in point.items() if k != "seed")
    done = found.setdefault(setting, [])
    if not row["status"]:
      done.append(row)
  return [(dict(setting), runs) for setting, runs in found.items()]


def summary(
  setting: Point, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """The settings of a point, then mean and deviation of what was measured.

  Returns:
    The settings, "seeds" (runs that finished), and for every number measured
    `NAME` and `NAME_std`, the deviation of a sample (NaN for one run).
  """
  row = {**setting, "seeds": len(runs)}
  for name in runs[0] if runs else ():
    values = [run[name] for run in runs if name in run]
    if name in OTHER or name in row or not all(map(_number, values)):
      continue
    row[name] = statistics.fmean(values)
    several = len(values) > 1
    row[f"{name}_std"] = statistics.stdev(values) if several else math.nan
  return row


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def report(
  rows: Sequence[Mapping[str, Any]],
  points: Sequence[Point],
  workdir: pathlib.Path,
) -> None:
  """Prints a table; writes `seeds.csv` and `seeds.png` into the workdir.

  Args:
    rows, points: see `groups`.
    workdir: of the runner.
  """
  found = groups(rows, points)
  table = {label(point): summary(point, runs) for point, runs in found}
  rows_lib.write_csv(workdir / "seeds.csv", list(table.values()))
  measures = [m for m in MEASURES if any(m in row for row in table.values())]
  show(_table(table, measures))
  if measures:
    first = measures[0]
    means = {
      name: (row[first], row[f"{first}_std"])
      for name, row in table.items()
      if first in row
    }
    dots.draw(
      means,
      workdir / "seeds.png", title=f"Held-out {first}",
      note="mean and deviation over seeds; grey: single runs",
      singles={label(p): [run[first] for run in runs] for p, runs in found},
    )  # fmt: skip


def label(point: Point) -> str:
  """`name=tome, keep=0.5`; "config" where nothing is set."""
  parts = [f"{key.rpartition('.')[2]}={v}" for key, v in point.items()]
  return ", ".join(parts) or "config"


def _table(
  rows: Mapping[str, Mapping[str, Any]], measures: Sequence[str]
) -> Table:
  cells = [
    [name, str(row["seeds"])]
    + [
      f"{row[m]:.4f} ± {row[f'{m}_std']:.4f}" if m in row else "-"
      for m in measures
    ]
    for name, row in rows.items()
  ]
  return Table(
    ("point", "seeds", *measures), cells, title="Mean and deviation over seeds",
    caption="±: deviation of one run",
  )  # fmt: skip
