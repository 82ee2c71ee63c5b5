"""The table and the plot of a benchmark of block-sparse attention."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.ticker
import rich.box
import rich.console
import rich.table
from matplotlib import figure

from tokjax.analysis.plots import COLOURS, INK, QUIET

Row = dict[str, Any]
# Ours in the colours of the plot; the others are dashed or points.
OURS = ("planned", "attention")


def show(rows: Sequence[Row]) -> None:
  """One line for each thing timed."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for name in ("size", "direction", "what"):
    table.add_column(name)
  for name in ("density", "ms", "TFLOP/s", "of peak", "of limit", "speed-up"):
    table.add_column(name, justify="right")
  previous = None
  for row in rows:
    group = _size(row), row["direction"]
    if previous not in (None, group):
      table.add_section()
    shown = group if group != previous else ("", "")
    previous = group
    table.add_row(*shown, *_cells(row))
  console = rich.console.Console()
  # A log file is as wide as the table.
  rich.console.Console(width=None if console.is_terminal else 110).print(table)


def _cells(row: Row) -> list[str]:
  """Name and numbers of a row."""
  percent = lambda x: "" if x is None else f"{100 * x:.1f} %"
  speedup = row["speedup"]
  return [
    row["name"],
    percent(row["density"]),
    f"{1e3 * row['seconds']:.3g}",
    "" if row["tflops"] is None else f"{row['tflops']:.3g}",
    percent(row["peak_share"]),
    percent(row["limit_share"]),
    "" if speedup is None else f"{speedup:.2f} x",
  ]


def _size(row: Row) -> str:
  return (
    f"b{row['batch']} s{row['length']} h{row['heads']}:{row['key_heads']}"
    f" d{row['head_size']}"
  )


def draw(
  rows: Sequence[Row], path: pathlib.Path, *, title: str, peak: float
) -> None:
  """Speed-up over dense and effective TFLOP/s against density.

  Args:
    rows: what `experiments.benchmark` measured.
    path: the PNG written.
    title: above the plot.
    peak: FLOP/s of a large product on this machine.
  """
  directions = list(dict.fromkeys(row["direction"] for row in rows))
  fig = figure.Figure(figsize=(5.6 * len(directions), 7.6), dpi=110)
  panels = fig.subplots(2, len(directions), squeeze=False, sharex=True)
  sizes = list(dict.fromkeys(_size(row) for row in rows))
  colours = dict(zip(sizes, COLOURS * len(sizes), strict=False))
  for column, direction in enumerate(directions):
    chosen = [row for row in rows if row["direction"] == direction]
    faster, rate = panels[0][column], panels[1][column]
    _lines(faster, chosen, "speedup", colours)
    _lines(rate, chosen, "tflops", colours)
    _ideal(faster, chosen)
    rate.axhline(peak / 1e12, color=QUIET, linestyle=":", linewidth=1)
    faster.set_title(direction, color=INK, fontsize=11)
    rate.set_xlabel("share of key blocks listed", color=INK)
    _scales(faster, rate, ticks=sorted({row["density"] for row in chosen}))
  panels[0][0].set_ylabel("times as fast as dense", color=INK)
  panels[1][0].set_ylabel("effective TFLOP/s (dotted: matmul peak)", color=INK)
  fig.suptitle(title, x=0.01, y=0.99, ha="left", color=INK, fontsize=12)
  handles, labels = _entries(panels[0][0], panels[1][0])
  fig.legend(
    handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9
  )
  lines = -(-len(labels) // 3)
  fig.tight_layout(rect=(0, 0.03 * lines + 0.01, 1, 0.98))
  fig.savefig(path)


def _lines(place, rows, what, colours) -> None:
  """A line for each size and form of ours, points for the others."""
  for size, colour in colours.items():
    of_size = [r for r in rows if _size(r) == size and r[what] is not None]
    for name in dict.fromkeys(row["name"] for row in of_size):
      line = sorted(
        (row["density"], row[what]) for row in of_size if row["name"] == name
      )
      x, y = zip(*line, strict=True)
      if name in OURS:
        style = dict(linestyle="-" if name == OURS[0] else "--", marker="o")
      else:
        style = dict(linestyle="", marker=_marker(name), fillstyle="none")
      place.plot(
        x, y, color=colour, markersize=5, linewidth=1.6,
        label=f"{name}, {size}", **style,
      )  # fmt: skip


def _marker(name: str) -> str:
  known = {"dense": "s", "einsum": "D", "splash": "^", "flex": "v"}
  return known.get(name, "x")


def _ideal(place, rows) -> None:
  """What it would be if time were proportional to what is listed."""
  x = sorted({row["density"] for row in rows if row["name"] in OURS})
  if x:
    place.plot(
      x, [1 / d for d in x], color=QUIET, linestyle=":", linewidth=1,
      label="1 / share listed",
    )  # fmt: skip
  place.axhline(1, color=QUIET, linewidth=0.6)


def _scales(*places, ticks) -> None:
  """Logarithmic axes with plain numbers; ticks of x where there are points."""
  plain = matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}")
  for place in places:
    place.set_xscale("log")
    place.set_yscale("log")
    for axis in (place.xaxis, place.yaxis):
      axis.set_major_formatter(plain)
      axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    place.set_xticks(ticks, [f"{100 * x:.3g} %" for x in ticks])
    for side in ("top", "right"):
      place.spines[side].set_visible(False)


def _entries(*places):
  """Handles and labels of all panels, each label once."""
  found = {}
  for place in places:
    for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  return list(found.values()), list(found)
