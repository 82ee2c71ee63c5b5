"""Whether a combination of methods beats the best single one at equal cost.

The best of many looks better than it is. So methods are chosen on half of the
questions and judged on the other half, and the other way round.
"""

from collections.abc import Sequence

import numpy as np

from experiments.sweeps import intervals
from experiments.sweeps.results import Results, Row

# Columns that say what a row costs.
COSTS = {"gflops": "FLOPs of prefill", "logical_bytes": "bytes of the cache"}


def words_of(right: np.ndarray) -> list[str]:
  """Which answers are right `[seeds, n]`, a word of 0 and 1 for each seed."""
  return ["".join("01"[int(x)] for x in row) for row in right]


def read(words: Sequence[str]) -> np.ndarray:
  """Undoes `words_of`."""
  return np.array([[letter == "1" for letter in word] for word in words])


def combines(row: Row) -> bool:
  """Whether a row is of several recipes."""
  return "+" in row["method"]


def best(rows: Sequence[Row], chosen: np.ndarray) -> Row:
  """The row with the most right answers to these questions."""
  return max(rows, key=lambda row: read(row["right"])[:, chosen].mean())


def verdict(rows: Sequence[Row], cost: str, most: float) -> str | None:
  """Best combination against best single method; None: there is one kind only.

  Args:
    rows: of reduced models.
    cost: column of `COSTS`.
    most: only rows that cost at most this.
  """
  able = [row for row in rows if row[cost] <= most]
  sides = [[row for row in able if combines(row) == x] for x in (True, False)]
  if not all(sides):
    return None
  count = len(able[0]["right"][0])
  gained, names = [], []
  # Drawn, since kinds of questions may take turns.
  first = np.random.default_rng(0).permutation(count) < count // 2
  for choose in (first, ~first):
    combination, single = (best(side, choose) for side in sides)
    own, other = (
      read(row["right"])[:, ~choose] for row in (combination, single)
    )
    gained.append(100.0 * (own.astype(float) - other))
    names.append(
      f"{combination['method']} ({combination['keep']:g}) against"
      f" {single['method']} ({single['keep']:g})"
    )
  found = intervals.difference(np.concatenate(gained, axis=1))
  clear = abs(found.mean) > found.half
  word = ("better" if found.mean > 0 else "worse") if clear else "not different"
  return (
    f"{word}: {found.mean:+.1f} ±{found.half:.1f} points,"
    f" {' and '.join(dict.fromkeys(names))}"
  )


def verdicts(results: Results) -> list[str]:
  """A line for each cost and each budget: what single methods cost, by keep."""
  rows = [row for row in results.reduced if row.get("right")]
  lines = []
  for cost, name in COSTS.items():
    whole = results.whole[cost]
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
      singles = [
        row[cost] for row in rows if row["keep"] == keep and not combines(row)
      ]
      if not singles:
        continue
      # So that half of the single methods at this keep ratio take part.
      most = float(np.median(singles))
      said = verdict(rows, cost, most)
      if said is not None:
        lines.append(
          f"combinations with at most {most / whole:.0%} of the {name}: {said}"
        )
  return lines
