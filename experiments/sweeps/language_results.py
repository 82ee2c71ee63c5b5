"""What the sweep of language models found: rows, table, plots."""

import math
import pathlib

import rich.box
import rich.console
import rich.table

from experiments.sweeps.results import Results, Row
from tokjax.analysis import heatmaps, plots

REFERENCE = "random_kv"


class LanguageResults(Results):
  """Rows of `language_sweep.row_of`; "none" is the full cache."""

  def kept(self, row: Row) -> float:
    """Bytes that count, as a share of the full cache's."""
    return row["logical_bytes"] / self.whole["logical_bytes"]

  def allocated(self, row: Row) -> float:
    """Bytes allocated, as a share of the full cache's."""
    return row["physical_bytes"] / self.whole["physical_bytes"]

  def lost_of(self, name: str, row: Row) -> float:
    """Points of a recall below the full cache's."""
    return 100 * (self.whole[name] - row[name])

  def worse(self, row: Row) -> float:
    """Nats a token above the full cache's."""
    return row["nats_per_token"] - self.whole["nats_per_token"]

  def draw(self, workdir: pathlib.Path, keep: float, note: str) -> None:
    """`kv_pareto.png` and the heat maps, `recall.png`."""
    savings = {
      "times fewer bytes that count": lambda row: 1 / self.kept(row),
      "times fewer bytes allocated": lambda row: 1 / self.allocated(row),
      "times faster decode steps, measured": lambda row: row["decode_speedup"],
    }
    losses = [
      (
        plots.Axis("points of recall lost, one needle", 2.0),
        lambda row: self.lost_of("recall", row),
      ),
      (
        plots.Axis("points of recall lost, several", 2.0),
        lambda row: self.lost_of("multi_key_recall", row),
      ),
      (plots.Axis("nats per token more, held-out text", 0.05), self.worse),
    ]
    panels = [
      [(axis, self.curves(x, y)) for x in savings.values()]
      for axis, y in losses
    ]
    if self.curves(self.kept, self.worse):
      plots.draw_pareto(
        panels,
        tuple(savings),
        workdir / "kv_pareto.png",
        title="What caches of fewer bytes lose",
        note=note,
        reference=REFERENCE,
      )
    shown = [r for r in self.rows if r["keep"] in (1.0, keep)]
    heatmaps.draw_recall(
      {row["method"]: row["recall_map"] for row in shown},
      self.whole["lengths"],
      self.whole["depths"],
      workdir / "recall.png",
      title=f"Recall of one needle, {keep:g} of the prompt kept",
    )

  def show(self) -> None:
    """Prints the table: one line a row, by keep and recall."""
    whole = self.whole
    table = rich.table.Table(
      box=rich.box.SIMPLE_HEAD,
      title=f"Full cache: recall {whole['recall']:.1%},"
      f" several {whole['multi_key_recall']:.1%}, perplexity"
      f" {math.exp(whole['nats_per_token']):.3f},"
      f" {whole['physical_bytes'] / 1024:.0f} KiB a text,"
      f" {whole['decode_ms']:.2f} ms a step",
      caption="first, middle, last: recall by depth, over all lengths; used,"
      " allocated: bytes as a share of the full cache's; decode, prefill:"
      " measured next to it",
    )
    table.add_column("method")
    for name in (
      "keep", "recall", "first", "middle", "last", "several", "perplexity",
      "used", "allocated", "decode", "prefill",
    ):  # fmt: skip
      table.add_column(name, justify="right")
    for row in sorted(self.rows, key=lambda r: (-r["keep"], -r["recall"])):
      table.add_row(*self._cells(row))
    console = rich.console.Console()
    if not console.is_terminal:
      console = rich.console.Console(width=140)
    console.print(table)
    for row in self.unreachable:
      console.print(
        f"{row['method']} at keep {row['keep']}: {row['reason']}",
        style="dim", highlight=False,
      )  # fmt: skip

  def _cells(self, row: Row) -> list[str]:
    columns = list(zip(*row["recall_map"], strict=True))
    by_depth = [sum(column) / len(column) for column in columns]
    middle = by_depth[len(by_depth) // 2]
    return [
      row["method"],
      f"{row['keep']:g}",
      *(f"{100 * x:.1f}" for x in (row["recall"], by_depth[0], middle)),
      f"{100 * by_depth[-1]:.1f}",
      f"{100 * row['multi_key_recall']:.1f}",
      f"{math.exp(row['nats_per_token']):.3f}",
      f"{self.kept(row):.1%}",
      f"{self.allocated(row):.1%}",
      f"{row['decode_speedup']:.2f}x",
      f"{row['prefill_overhead']:+.0%}",
    ]
