"""The rows of a sweep and the file that they are kept in."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import typed
from experiments.training import rows as rows_lib
from experiments.training import rundir
from tokjax.analysis import pareto

Row = dict[str, Any]
SCALARS = (str, int, float)
# The method of the unreduced model's row, whose keep is 1.
WHOLE = "none"


class ResultsError(typed.ConfigError):
  """A file of results that cannot be continued; the message says what to do."""


class Results:
  """Rows of a sweep, written whole after every change.

  A file of another config is not continued but moved aside, so that no plot
  mixes two experiments.

  Attributes:
    rows: one for each method and keep ratio; "none" is the unreduced model.
    unreachable: methods and keep ratios that cannot be, with the reason.

  Raises:
    ResultsError: the file is there and is damaged.
  """

  def __init__(self, path: pathlib.Path, config: Mapping[str, Any]):
    self._path, self._config = path, dict(config)
    text = json.dumps(self._config, sort_keys=True, default=str)
    self._print = hashlib.sha256(text.encode()).hexdigest()[:16]
    self.rows: list[Row] = []
    self.unreachable: list[Row] = []
    if path.exists():
      found = _read(path)
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

  def write_csv(self, path: pathlib.Path) -> None:
    """The rows for a spreadsheet: what is a number or a word in them."""
    plain = [
      {name: x for name, x in row.items() if isinstance(x, SCALARS)}
      for row in self.rows
    ]
    rows_lib.write_csv(path, plain)

  @property
  def whole(self) -> Row:
    """The row of the unreduced model."""
    (row,) = [row for row in self.rows if row["method"] == WHOLE]
    return row

  @property
  def reduced(self) -> list[Row]:
    """All other rows."""
    return [row for row in self.rows if row["method"] != WHOLE]

  def curves(
    self, x: Callable[[Row], float], y: Callable[[Row], float]
  ) -> pareto.Curves:
    """(x, y) of every row of each method but the unreduced model."""
    out: dict[str, list[tuple[float, float]]] = {}
    for row in self.reduced:
      out.setdefault(row["method"], []).append((x(row), y(row)))
    return out


def writable(folder: str | pathlib.Path, name: str) -> pathlib.Path:
  """The folder, made unless it is there; `name` is the argument's.

  Raises:
    ConfigError: it cannot be made or written to.
  """
  if reason := rundir.not_local(folder):
    raise typed.ConfigError(f"{name}={str(folder)!r}: {reason}")
  path = pathlib.Path(folder)
  try:
    if not str(folder):
      raise NotADirectoryError("it is empty")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
      raise PermissionError("it is read-only")
  except OSError as error:
    reason = error.strerror or str(error)
    raise typed.ConfigError(
      f"{name}={str(folder)!r}: must be a directory that can be written"
      f" ({reason})"
    ) from error
  return path


def _read(path: pathlib.Path) -> dict[str, Any]:
  """The content of a file that `Results.save` wrote."""
  try:
    found = json.loads(path.read_text())
    problem = _problem(found)
  except (OSError, ValueError, RecursionError) as error:
    problem = f"{type(error).__name__}: {error}"
  if problem:
    raise ResultsError(
      f"{path}: is damaged and cannot be continued ({problem}); move it away to"
      " measure anew"
    )
  return found


def _problem(found: Any) -> str | None:
  """What is wrong with the content of a file; None: nothing."""
  if not isinstance(found, dict):
    return "it holds no JSON object"
  wanted = {"fingerprint": str, "rows": list, "unreachable": list}
  for key, kind in wanted.items():
    if not isinstance(found.get(key), kind):
      return f"{key!r} is missing or no {kind.__name__}"
  for key, names in (("rows", ()), ("unreachable", ("reason",))):
    for i, row in enumerate(found[key]):
      if not isinstance(row, dict) or row.keys() != found[key][0].keys():
        return f"{key}[{i}] has other columns than the first"
      if missing := {"method", "keep", *names} - row.keys():
        return f"{key}[{i}] has no {sorted(missing)[0]!r}"
  if sum(row["method"] == WHOLE for row in found["rows"]) > 1:
    return f"two rows of the method {WHOLE!r}"
  return None
