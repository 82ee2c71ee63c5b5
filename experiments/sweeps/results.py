"""What a sweep found: `pareto.json` and the table on the terminal."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from tokjax.analysis import pareto, plots

Row = dict[str, Any]


class Results:
  """Rows of a sweep, written whole after every change.

  A file of another config is not continued but moved aside, so that no plot
  mixes two experiments.

  Attributes:
    rows: one for each method and keep ratio; "none" is the unreduced model.
    unreachable: methods and keep ratios that cannot be, with the reason.
  """

  def __init__(self, path: pathlib.Path, config: Mapping[str, Any]):
    self._path, self._config = path, dict(config)
    text = json.dumps(self._config, sort_keys=True, default=str)
    self._print = hashlib.sha256(text.encode()).hexdigest()[:16]
    self.rows: list[Row] = []
    self.unreachable: list[Row] = []
    if path.exists():
      found = json.loads(path.read_text())
      if found["fingerprint"] == self._print:
        self.rows, self.unreachable = found["rows"], found["unreachable"]
      else:
        path.rename(path.with_name(f"{path.stem}.{found['fingerprint']}.json"))

  def has(self, method: str, keep: float | None) -> bool:
    """Whether a method and keep ratio is done, or known to be impossible."""
    return any(
      row["method"] == method and row["keep"] == keep
      for row in self.rows + self.unreachable
    )

  def save(self, rows: Sequence[Row], unreachable: Sequence[Row] = ()) -> None:
    """Adds rows; a reader never sees half a file."""
    self.rows += rows
    self.unreachable += unreachable
    whole = {
      "fingerprint": self._print,
      "config": self._config,
      "rows": self.rows,
      "unreachable": self.unreachable,
    }
    new = self._path.with_suffix(".new")
    new.write_text(json.dumps(whole, indent=1, default=str) + "\n")
    os.replace(new, self._path)

  @property
  def whole(self) -> Row:
    """The row of the unreduced model."""
    (row,) = [row for row in self.rows if row["method"] == "none"]
    return row

  def curves(
    self, x: Callable[[Row], float], y: Callable[[Row], float]
  ) -> pareto.Curves:
    """(x, y) of every row of each method but "none"."""
    out: dict[str, list[tuple[float, float]]] = {}
    for row in self.rows:
      if row["method"] != "none":
        out.setdefault(row["method"], []).append((x(row), y(row)))
    return out

  def lost(self, row: Row) -> float:
    """Points of accuracy below the unreduced model."""
    return 100 * (self.whole["accuracy"] - row["accuracy"])

  def share(self, row: Row) -> float:
    """FLOPs as a share of the unreduced model's."""
    return row["gflops"] / self.whole["gflops"]

  def ranking(self, shares: Sequence[float]) -> list[pareto.Ranked]:
    """Methods by accuracy lost at equal cost, see `pareto.rank`."""
    return pareto.rank(
      self.curves(self.share, self.lost),
      self.curves(self.share, lambda row: row["drift"]),
      shares,
    )

  def draw(self, path: pathlib.Path, *, title: str, note: str) -> None:
    """Accuracy and drift against FLOPs saved and time saved."""
    saved = lambda row: 1 / self.share(row)
    faster = lambda row: row["speedup"]
    lost = plots.Axis(
      f"points of accuracy lost (of {100 * self.whole['accuracy']:.1f} %)", 1.0
    )
    drift = plots.Axis("answers moved by (KL divergence, nats)", 1e-3)
    of_drift = lambda row: row["drift"]
    panels = [
      [(lost, self.curves(x, self.lost)) for x in (saved, faster)],
      [(drift, self.curves(x, of_drift)) for x in (saved, faster)],
    ]
    labels = ("times fewer FLOPs", "times faster, measured")
    plots.draw_pareto(panels, labels, path, title=title, note=note)


def show(results: Results, shares: Sequence[float]) -> None:
  """Prints the table: one line a method, the smallest loss at the top."""
  whole = results.whole
  table = rich.table.Table(
    box=rich.box.SIMPLE_HEAD,
    title=f"Points of accuracy lost at equal cost; unreduced:"
    f" {whole['accuracy']:.2%}, {whole['gflops']:.3g} GFLOPs an image,"
    f" {whole['images_per_second']:.0f} images/s",
    caption="cost: FLOPs of the compiled program, selection included, as a"
    " share of the unreduced model's; drift: KL divergence of the answers in"
    " nats, decides ties; keep: accuracy and measured speed-up; * on the Pareto"
    " front; - not reached",
  )
  table.add_column("method")
  for share in shares:
    table.add_column(f"at {share:.0%}", justify="right")
  table.add_column(f"drift at {shares[0]:.0%}", justify="right")
  keeps = sorted({row["keep"] for row in results.rows} - {1.0}, reverse=True)
  for keep in keeps:
    table.add_column(f"keep {keep:g}", justify="right")
  for ranked in results.ranking(shares):
    losses = ["-" if x != x else f"{x:.1f}" for x in ranked.loss]
    drift = "-" if ranked.drift != ranked.drift else f"{ranked.drift:.0e}"
    name = f"{ranked.method} *" if ranked.on_front else ranked.method
    cells = [_cell(results, ranked.method, keep) for keep in keeps]
    table.add_row(name, *losses, drift, *cells)
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=140)
  console.print(table)
  for row in results.unreachable:
    console.print(
      f"{row['method']} at keep {row['keep']}: {row['reason']}",
      style="dim", highlight=False,
    )  # fmt: skip


def _cell(results: Results, method: str, keep: float) -> str:
  """Accuracy and measured speed-up of one row."""
  for row in results.rows:
    if (row["method"], row["keep"]) == (method, keep):
      return f"{100 * row['accuracy']:.1f} {row['speedup']:.2f}x"
  return "-"
