"""How the rows of a sweep are shown: a table on the terminal, a plot."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import rich.box
import rich.console
import rich.table

from experiments.sweeps.results import Results, Row
from tokjax.analysis import plots

Measure = Callable[[Row], float]


@dataclasses.dataclass(frozen=True)
class Loss:
  """A y axis.

  Attributes:
    axis: its label and scale.
    measure: what it shows of a row.
    interval: half of the measure's interval; None: it is not known.
  """

  axis: plots.Axis
  measure: Measure
  interval: Measure | None = None


@dataclasses.dataclass(frozen=True)
class Plot:
  """Losses against savings; the unreduced model loses 0 and saves 1.

  Attributes:
    title: one line above.
    savings: factors by the label of their x axis, a column for each.
    losses: a row for each.
    reference: the method drawn dashed.
    baselines: methods that are grey: a front ends where one is better.
  """

  title: str
  savings: Mapping[str, Measure]
  losses: Sequence[Loss]
  reference: str = "random"
  baselines: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Table:
  """Text in columns; the first is flush left, the others flush right.

  Attributes:
    header: names of the columns.
    rows: their cells.
    title, caption: lines above and below.
    notes: lines at the end.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  title: str = ""
  caption: str = ""
  notes: Sequence[str] = ()


def draw(results: Results, plot: Plot, path: pathlib.Path, note: str) -> None:
  """Writes the plot as a PNG; `note` is printed next to the title."""
  plots.draw_pareto(
    [
      [
        plots.Panel(
          loss.axis,
          results.curves(x, loss.measure),
          loss.interval and results.curves(x, loss.interval),
        )
        for x in plot.savings.values()
      ]
      for loss in plot.losses
    ],
    tuple(plot.savings),
    path,
    title=plot.title,
    note=note,
    reference=plot.reference,
    baselines=plot.baselines,
  )


def show(table: Table, unreachable: Sequence[Row] = ()) -> None:
  """Prints the table and its notes, then a line for each row that cannot be."""
  printed = rich.table.Table(
    box=rich.box.SIMPLE_HEAD,
    title=table.title or None,
    caption=table.caption or None,
  )
  for i, name in enumerate(table.header):
    printed.add_column(name, justify="right" if i else "left", no_wrap=not i)
  for row in table.rows:
    printed.add_row(*row)
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=140)
  console.print(printed)
  refused = (f"{row['method']} at keep {row['keep']}: {row['reason']}"
             for row in unreachable)  # fmt: skip
  for line in (*table.notes, *refused):
    console.print(line, style="dim", highlight=False)
