"""The table of `experiments.sweeps.learned_table`: means over seeds."""

import json
import pathlib

import numpy as np

from experiments.sweeps.report import Table
from experiments.sweeps.results import Row

VALUES = ("accuracy", "noise", "occlusion", "blur")


def summary(rows: list[Row]) -> list[Row]:
  """One row for each method and selection: mean and deviation over seeds."""
  groups: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    groups.setdefault((row["method"], row["selection"]), []).append(row)
  out = []
  for (method, selection), members in groups.items():
    row: Row = {"method": method, "selection": selection, "seeds": len(members)}
    row["gflops"] = members[0]["gflops"]
    for name in VALUES:
      if name in members[0]:
        values = [member[name] for member in members]
        row[name] = float(np.mean(values))
        row[f"{name} std"] = float(np.std(values))
    out.append(row)
  return out


def cells(row: Row) -> list[str]:
  """A row of the table as text."""
  values = [
    f"{row[name]:.1f} ± {row[f'{name} std']:.1f}" if name in row else "-"
    for name in VALUES
  ]
  cost = f"{1e3 * row['gflops']:.1f}"
  return [row["method"], row["selection"], cost, *values, str(row["seeds"])]


HEADER = ("method", "selection", "MFLOPs", *VALUES, "seeds")


def markdown(rows: list[Row]) -> str:
  """The table of `summary` in Markdown."""
  lines = [HEADER, ["---"] * len(HEADER), *map(cells, summary(rows))]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(workdir: pathlib.Path) -> list[Row]:
  """Collects the finished rows into `rows.json` and `table.md`."""
  rows = []
  for path in sorted((workdir / "rows").glob("*.json")):
    rows += json.loads(path.read_text())
  (workdir / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
  (workdir / "table.md").write_text(markdown(rows))
  return rows


def table(rows: list[Row]) -> Table:
  """The table of `summary` for the terminal."""
  return Table(HEADER, [cells(row) for row in summary(rows)])
