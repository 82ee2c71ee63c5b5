"""The report in Markdown.

What is derived from measured rows is computed here, so that it also compares
rows of different processes:

    TFLOP/s   `flops / seconds`; the formulas of `flops` are in `FORMULAS`
    of peak   that, of the product that stage b timed
    GB/s      `bytes / seconds`
    times     seconds of the row named `against`, over those of this one
"""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# The row whose rate is the peak that others are related to.
PEAK = "product bfloat16"
FORMULAS = """\
*   Times are medians of several rounds (7, or 3 of what takes long) after calls
    to warm up; in a round calls follow each other, and the last is waited for.
    `spread` is half of the distance between the fastest and the slowest round.
*   FLOPs of attention are effective ones, of pairs that are shown: `4 * pairs *
    head size` forward (two products) and `10 * pairs * head size` backward
    (five products), each per query head. The backward pass is timed alone, from
    stored residuals to the gradients of q, k and v.
*   FLOPs of attention mass: `2 * pairs * head size` forward, with a given
    log-sum-exp, and `6 * pairs * head size` backward. Of linear attention: `4 *
    tokens * head size ** 2` a head forward, 2.5 times that backward.
*   FLOPs of models are what JAX counts in the program as written.
*   GB/s are of what has to be moved once: operands and results; in decode the
    keys and values that are read.
*   `times` says how many times as fast as its `rival`, another row, a row is.
*   A check is right if every array is within `allowed`, which is relative to
    its largest number, and to its norm. What is timed rests on the check of its
    head size and kind of mask: where that went wrong, or the process died of
    it, the row is skipped.
"""


def report(facts: Row, stages: Sequence[Row]) -> str:
  """All that is known, as one page."""
  rows = {row["name"]: row for stage in stages for row in stage["rows"]}
  parts = [f"# {facts.get('device', 'No device has answered yet')}\n"]
  if facts.get("platform") == "cpu":
    parts.append(
      "No accelerator: sizes are tiny, and the times say nothing but that the"
      " command works.\n"
    )
    if facts.get("card"):
      parts.append("**There is a card, but JAX does not see it.**\n")
  parts.append(_table([{"": key, " ": x} for key, x in facts.items()]))
  for stage in stages:
    parts.append(f"## {stage['letter']}: {stage['name']}\n")
    about = stage["about"][0].upper() + stage["about"][1:]
    parts.append(f"{about}. {_state(stage)}.\n")
    shown = [line(row, rows) for row in ordered(stage, rows)]
    if shown:
      parts.append(_table(shown))
  return "\n".join([*parts, "## How to read it\n", FORMULAS])


def _state(stage: Row) -> str:
  status = stage["status"][0].upper() + stage["status"][1:]
  if stage["seconds"]:
    status += f", after {stage['seconds']:.0f} s"
  return status


def ordered(stage: Row, rows: dict[str, Row]) -> list[Row]:
  """Rows as they came, or of a search the best ones first."""
  if stage["best"] is None:
    return stage["rows"]
  rank = lambda row: -(times(row, rows) or 0.0)
  return sorted(stage["rows"], key=rank)[: stage["best"]]


def times(row: Row, rows: dict[str, Row]) -> float | None:
  """How many times as fast as its rival a row is; None: one has no time."""
  rival = rows.get(row.get("against", ""), {})
  if rival is row or "seconds" not in row or "seconds" not in rival:
    return None
  return rival["seconds"] / row["seconds"]


_CONSUMED = ("name", "seconds", "fastest", "slowest", "flops", "bytes")
_DERIVED = ("against", "error", "skipped")


def line(row: Row, rows: dict[str, Row]) -> dict[str, str]:
  """A row's cells by column."""
  cells = {"what": row["name"]}
  if "seconds" in row:
    cells |= _rates(row, rows.get(PEAK, {}))
  faster = times(row, rows)
  if faster is not None:
    cells |= {"times": f"{faster:.3g}", "rival": row["against"]}
  for key, value in row.items():
    if key not in _CONSUMED + _DERIVED:
      cells[key.replace("_", " ")] = _cell(value)
  for key in ("error", "skipped"):
    if key in row:
      cells["note"] = f"{key}: {row[key]}"
  return cells


def _rates(row: Row, peak: Row) -> dict[str, str]:
  seconds = row["seconds"]
  spread = (row["slowest"] - row["fastest"]) / 2 / seconds
  cells = {"ms": f"{1e3 * seconds:.4g}", "spread": f"{100 * spread:.1f} %"}
  if "flops" in row:
    cells["TFLOP/s"] = f"{row['flops'] / seconds / 1e12:.4g}"
    if "seconds" in peak and row is not peak:
      most = peak["flops"] / peak["seconds"]
      cells["of peak"] = f"{100 * row['flops'] / seconds / most:.1f} %"
  if "bytes" in row:
    cells["GB/s"] = f"{row['bytes'] / seconds / 1e9:.4g}"
  return cells


def _cell(value: Any) -> str:
  if isinstance(value, bool):
    return "yes" if value else "**no**"
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(lines: list[dict[str, str]]) -> str:
  """Markdown with a column for each key, in order of appearance."""
  keys = list(dict.fromkeys(key for cells in lines for key in cells))
  if "note" in keys:
    keys.remove("note")
    keys.append("note")
  clean = lambda text: str(text).replace("|", "/").replace("\n", " ")
  rows = [keys, ["---"] * len(keys)]
  rows += [[clean(cells.get(key, "")) for key in keys] for cells in lines]
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)
