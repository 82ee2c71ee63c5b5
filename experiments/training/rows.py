"""`metrics.jsonl`: one JSON object a line, with "step" and "split".

`write_csv` is for tables of any rows.
"""

import csv
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.training.errors import CheckpointError

NAME = "metrics.jsonl"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows; a last line without its end, of a killed run, is left out.

  Raises:
    CheckpointError: a line that is no row; the message says which.
  """
  lines = path.read_bytes().split(b"\n")
  return [_row(path, i, line) for i, line in enumerate(lines[:-1], 1)]


def keep_until(path: pathlib.Path, step: int) -> None:
  """Drops rows of later steps, and a last line that was cut.

  The file is replaced as a whole, so that a kill loses nothing.

  Raises:
    CheckpointError: see `read`.
  """
  if not path.exists():
    return
  rows = [row for row in read(path) if row["step"] <= step]
  part = path.with_name(f"{path.name}.part")
  part.write_text("".join(json.dumps(row) + "\n" for row in rows))
  os.replace(part, path)


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """A column for every name that some row has; what a row lacks is empty."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)


def _row(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    row = None
  if isinstance(row, dict):
    kinds = type(row.get("step")), type(row.get("split"))
    if kinds == (int, str):
      return row
  raise CheckpointError(
    f"{path}: line {number} is damaged: {line[:80].decode(errors='replace')!r}"
    " is not an object with step and split. Remove that line, or the file,"
    " and start again."
  )
