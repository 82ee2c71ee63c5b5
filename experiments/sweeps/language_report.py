"""How the rows of a sweep of language models are shown."""

import math
from collections.abc import Sequence

from experiments.sweeps.report import Loss, Plot, Table
from experiments.sweeps.results import Results, Row
from tokjax.analysis import plots


def plot(results: Results, others: Sequence[str]) -> Plot:
  """Answers and perplexity against bytes saved and time saved.

  Args:
    results: of the sweep.
    others: tasks other than "single" and "keys".
  """
  whole = results.whole
  points = lambda name: lambda row: 100 * (whole[name] - row[name])
  half = lambda name: lambda row: row[f"{name}_interval"]
  worse = lambda row: row["nats_per_token"] - whole["nats_per_token"]
  used = lambda row: 1 / _share("logical_bytes", row, whole)
  allocated = lambda row: 1 / _share("physical_bytes", row, whole)
  losses = [
    Loss(plots.Axis(label, 2.0), points(name), half(name))
    for name, label in (
      ("recall", "points of recall lost, one needle"),
      ("multi_key_recall", "points of recall lost, several"),
      ("tasks", "points lost, all questions"),
    )
    if f"{name}_interval" in whole and (name != "tasks" or others)
  ]
  nats = plots.Axis("nats per token more, held-out text", 0.05)
  return Plot(
    title="What caches of fewer bytes lose",
    savings={
      "times fewer bytes that count": used,
      "times fewer bytes allocated": allocated,
      "times faster decode steps, measured": lambda r: r["decode_speedup"],
    },
    losses=[*losses, Loss(nats, worse, half("nats"))],
    reference="random_kv",
  )


def table(
  results: Results, others: Sequence[str], texts: Sequence[str]
) -> Table:
  """A line for each row, by keep and questions answered.

  Args:
    results: of the sweep.
    others: tasks other than "single" and "keys".
    texts: names of the texts.
  """
  whole = results.whole
  rows = sorted(results.rows, key=lambda r: (-r["keep"], -r["tasks"]))
  named = ["perplexity"] if len(texts) == 1 else texts
  return Table(
    ("method", "keep", "recall", "first", "middle", "last", "several")
    + (*others, *named, "used", "allocated", "decode", "prefill"),
    [_cells(row, whole, others, texts) for row in rows],
    title=f"Full cache: {100 * whole['tasks']:.1f} % of all answers,"
    f" perplexity {math.exp(whole['nats_per_token']):.3f},"
    f" {whole['physical_bytes'] / 1024:.0f} KiB a text,"
    f" {whole['decode_ms']:.2f} ms a step",
    caption="±: 95 % interval of what is lost against the full cache; first,"
    " middle, last: recall by depth, over all lengths; other numbers after"
    " several: tasks in percent, then perplexity of texts; used, allocated:"
    " bytes as a share of the full cache's; decode, prefill: measured next to"
    " it",
    notes=[
      f"{row['method']} at keep {row['keep']:g}, {row['fitted']}"
      for row in rows
      if row.get("fitted")
    ],
  )


def _share(name: str, row: Row, whole: Row) -> float:
  """Bytes as a share of the full cache's."""
  return row[name] / whole[name]


def _cells(
  row: Row, whole: Row, others: Sequence[str], texts: Sequence[str]
) -> list[str]:
  by_depth = [
    sum(column) / len(column)
    for column in zip(*row["recall_map"], strict=True)
  ]
  middle = len(by_depth) // 2
  places = [by_depth[i] for i in (0, middle, -1)] if by_depth else [None] * 3
  percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
  return [
    row["method"],
    f"{row['keep']:g}",
    _recall(row, "recall"),
    *map(percent, places),
    _recall(row, "multi_key_recall"),
    *(percent(row[f"task_{name}"]) for name in others),
    *(f"{math.exp(row[f'nats_{name}']):.3f}" for name in texts),
    f"{_share('logical_bytes', row, whole):.1%}",
    f"{_share('physical_bytes', row, whole):.1%}",
    f"{row['decode_speedup']:.2f}x",
    f"{row['prefill_overhead']:+.0%}",
  ]


def _recall(row: Row, name: str) -> str:
  """Percent, with the interval of what is lost."""
  if row[name] is None:
    return "-"
  return f"{100 * row[name]:.1f} ±{row[f'{name}_interval']:.1f}"
