"""How the rows of a sweep of vision-language models are shown."""

from collections.abc import Sequence

import numpy as np

from experiments.sweeps import intervals, question_budget
from experiments.sweeps.report import Loss, Plot, Table
from experiments.sweeps.results import Results, Row
from tokjax.analysis import plots

# What a method that chooses has to beat, and what is grey in plots.
REFERENCE = "random_visual"
BASELINES = ("random_visual", "avgpool_visual")
CALLS = ("prefill", "first", "decode")


def plot(results: Results, kinds: Sequence[str]) -> Plot:
  """Accuracy of each kind of question against FLOPs, bytes and time saved."""
  whole = results.whole
  saved = lambda name: lambda row: whole[name] / row[name]
  count = len({row["method"] for row in results.reduced})
  return Plot(
    title=f"{count} ways to reduce visual tokens, none trained",
    savings={
      "times fewer FLOPs of prefill": saved("gflops"),
      "times fewer bytes of the cache": saved("logical_bytes"),
      "times faster to the first token": lambda row: row["first_speedup"],
    },
    losses=[
      Loss(
        plots.Axis(
          f"points lost, {kind} (of {100 * whole[f'accuracy_{kind}']:.1f} %)",
          2.0,
        ),
        lambda row, kind=kind: row[f"lost_{kind}"],
        lambda row, kind=kind: row[f"lost_{kind}_interval"],
      )
      for kind in kinds
    ],
    reference=REFERENCE,
    baselines=BASELINES,
  )


def table(results: Results, kinds: Sequence[str]) -> Table:
  """A line for each row, by keep and right answers."""
  whole = results.whole
  rows = sorted(
    results.rows, key=lambda row: (-row["keep"], -row["accuracy_all"])
  )
  shown = kinds if len(kinds) > 1 else ()
  verdicts = [
    unclear(results, keep, kind)
    for kind in kinds[:1]
    for keep in dict.fromkeys(row["keep"] for row in rows if row["keep"] < 1)
  ]
  return Table(
    ("method", "keep", "all", *shown, "named", "kept", "tokens")
    + ("FLOPs", "cache", *CALLS),
    [_cells(row, whole, shown) for row in rows],
    title=f"Right answers in percent; unreduced:"
    f" {100 * whole['accuracy_all']:.1f} %, {whole['gflops']:.3g} GFLOPs and"
    f" {whole['logical_bytes'] / 1024:.0f} KiB a question",
    caption="±: 95 % interval of what is lost against the unreduced model;"
    " named, kept: cells that questions name, and patches, that are part of a"
    " token at the end; tokens: visual ones as they enter the language model;"
    " FLOPs: of prefill, vision and selection included; cache: bytes that"
    " count; both as shares"
    " of the unreduced model's; prefill, first (token), decode: measured"
    f" speed-up{looks(whole)}{''.join(filter(None, verdicts))}",
    notes=question_budget.verdicts(results),
  )


def looks(whole: Row) -> str:
  """Where the last token looks in the unreduced model, in words."""
  if whole["looks"] is None:
    return ""
  blocks = [f"{own:.0%} of {every:.0%}" for own, every in whole["looks"]]
  return (
    "; attention of the last token to the cell that a question names, and to"
    f" all patches, block by block: {', '.join(blocks)}"
  )


def unclear(results: Results, keep: float, kind: str) -> str:
  """Which methods do not beat the reference at a keep ratio, in words."""
  rows = {row["method"]: row for row in results.rows if row["keep"] == keep}
  if REFERENCE not in rows:
    return ""
  by_seed = {m: np.array(r[f"lost_{kind}_by_seed"]) for m, r in rows.items()}
  halves = {m: [r[f"lost_{kind}_interval"]] for m, r in rows.items()}
  found = intervals.unclear(by_seed, halves, REFERENCE)
  if not found:
    return ""
  return (
    f"; {kind}, keep {keep:g}: not clearly better than {REFERENCE}:"
    f" {', '.join(found)}"
  )


def _cells(row: Row, whole: Row, kinds: Sequence[str]) -> list[str]:
  share = lambda name: f"{row[name] / whole[name]:.1%}"
  percent = lambda x: "-" if x is None else f"{x:.0%}"
  answers = [
    f"{100 * row[f'accuracy_{kind}']:.1f} ±{row[f'lost_{kind}_interval']:.1f}"
    for kind in ("all", *kinds)
  ]
  return [
    row["method"],
    f"{row['keep']:g}",
    *answers,
    percent(row["kept_named"]),
    percent(row["kept"]),
    str(row["image_tokens"]),
    share("gflops"),
    share("logical_bytes"),
    *(f"{row[f'{name}_speedup']:.2f}x" for name in CALLS),
  ]

