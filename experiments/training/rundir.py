"""What a run directory records: config, versions, git state, command."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
  "ml_collections", "tensorflow-datasets",
)  # fmt: skip
ROOT = pathlib.Path(__file__).resolve().parents[1]


def record(workdir: pathlib.Path, config: dict[str, Any], table: str) -> None:
  """Writes what a run is; every launch adds a line to `launches.jsonl`.

  Args:
    config: goes to `config.json`.
    table: of the parameters, goes to `parameters.txt`.
  """
  if jax.process_index():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  (workdir / "parameters.txt").write_text(table + "\n")
  device = jax.devices()[0]
  launch = {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": [sys.executable, *sys.argv],
    "host": platform.node(),
    "python": platform.python_version(),
    "versions": versions(),
    "devices": f"{jax.device_count()} x {device.device_kind}",
    "processes": jax.process_count(),
    **git_state(),
  }
  with (workdir / "launches.jsonl").open("a") as f:
    f.write(json.dumps(launch) + "\n")
  if launch["git_changes"]:
    (workdir / "git.diff").write_text(_git("diff", "HEAD") or "")


def versions() -> dict[str, str]:
  """Of the packages that decide what a run computes."""
  out = {}
  for name in PACKAGES:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return out


def git_state() -> dict[str, Any]:
  """Commit and changed files; None outside of a repository."""
  changes = _git("status", "--porcelain")
  return {
    "git_commit": (_git("rev-parse", "HEAD") or "").strip() or None,
    "git_changes": changes.splitlines() if changes else [],
  }


def _git(*args: str) -> str | None:
  try:
    done = subprocess.run(
      ["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20,
      check=False,
    )  # fmt: skip
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout if done.returncode == 0 else None
