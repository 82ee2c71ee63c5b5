"""What was measured so far, in memory and on disk."""

import json
import pathlib
import threading
from typing import Any

from bench import files
from scripts.report import tables
from scripts.report.stages import Stage


class Results:
  """Rows by stage; every change is written to `report.json` and `report.md`.

  Args:
    folder: where to.
    facts: what is known of machine, versions and command.
    stages: in order.

  Raises:
    OSError: the folder cannot be made or written to.
  """

  def __init__(
    self, folder: pathlib.Path, facts: dict[str, Any], stages: tuple[Stage, ...]
  ):
    self._folder, self._lock = folder, threading.Lock()
    self.facts = facts
    self.stages = [
      {
        "letter": stage.letter, "name": stage.name, "about": stage.about,
        "best": stage.best, "status": "not begun", "seconds": 0.0, "rows": [],
      }
      for stage in stages
    ]  # fmt: skip
    self._by_name = {entry["name"]: entry for entry in self.stages}
    folder.mkdir(parents=True, exist_ok=True)
    self._write()

  def add(self, stage: Stage, row: dict[str, Any]) -> None:
    """One more row of a stage."""
    with self._lock:
      entry = self._by_name[stage.name]
      entry["status"] = "under way"
      entry["rows"].append(row)
      self._write()

  def end(
    self, stage: Stage, status: str, seconds: float, device: Any = None
  ) -> None:
    """A stage is over."""
    with self._lock:
      self._by_name[stage.name] |= {"status": status, "seconds": seconds}
      if device is not None:
        self.facts |= device
      self._write()

  def wrong(self) -> list[str]:
    """Names of checks that failed: of wrong results, or without any."""
    return [
      row["name"]
      for entry in self.stages
      for row in entry["rows"]
      if "error" in row or row.get("right") is False
    ]

  def wrong_results(self) -> list[str]:
    """Names of checks that found a wrong result."""
    return [
      row["name"]
      for entry in self.stages
      for row in entry["rows"]
      if row.get("right") is False
    ]

  def text(self) -> str:
    """The report in Markdown."""
    return tables.report(self.facts, self.stages)

  def _write(self) -> None:
    whole = json.dumps({"facts": self.facts, "stages": self.stages}, indent=1)
    files.write(self._folder / "report.json", whole + "\n")
    files.write(self._folder / "report.md", self.text())
