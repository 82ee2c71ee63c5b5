"""A run directory: its lock; config, versions, git state, command."""

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.training.errors import WorkdirError
from tokjax import zoo

PACKAGES = (
  "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
  "ml_collections", "tensorflow-datasets",
)  # fmt: skip
ROOT = pathlib.Path(__file__).resolve().parents[1]


LOCK = "lock"


def make(workdir: str | pathlib.Path) -> pathlib.Path:
  """Creates the directory unless it is there.

  Raises:
    WorkdirError: it is empty text, an address, a file, or cannot be written
      to.
  """
  if not str(workdir):
    raise WorkdirError("workdir='': must name a directory")
  if reason := not_local(workdir):
    raise WorkdirError(f"workdir={str(workdir)!r}: {reason}")
  workdir = pathlib.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = "is not a directory" if workdir.exists() else error.strerror
    raise WorkdirError(f"workdir={str(workdir)!r}: {reason}") from error
  return workdir


def not_local(folder: str | pathlib.Path) -> str:
  """Why an address such as gs://bucket/run cannot be used; "": it is none."""
  if "://" not in str(folder):
    return ""
  return (
    "must be a local directory; locks and atomic writes need one. Mount the"
    " bucket (gcsfuse), or copy the directory afterwards"
  )


def shared_programs(
  workdir: str | pathlib.Path, seconds: float = 0.5
) -> dict[str, Any]:
  """Options of JAX with which the runs in a directory share what they compile.

  Programs that compile in less than `seconds` are not worth a file. Empty with
  several devices on one CPU: XLA crashes in programs that it reads there.
  """
  if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return {}
  return {
    "jax_compilation_cache_dir": str(pathlib.Path(workdir) / "programs"),
    "jax_persistent_cache_min_compile_time_secs": seconds,
  }


def keep_programs() -> None:
  """Keeps compiled programs in the user's cache, for the next process.

  A folder that is set by `JAX_COMPILATION_CACHE_DIR` stays; an empty one keeps
  nothing. The programs of blocks are small: they compile and load fast.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  for option, value in shared_programs(zoo.cache(), seconds=0.05).items():
    jax.config.update(option, value)


def lock(workdir: pathlib.Path) -> TextIO:
  """Keeps other processes from using the directory until the file is closed.

  The operating system holds the lock (`flock` of the file `lock`) and releases
  it when the process ends, however that happens. No device is touched.

  Raises:
    WorkdirError: another process holds it, or nothing can be written there.
  """
  handle = None
  try:
    handle = (workdir / LOCK).open("a+")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    refused = _refused(workdir, handle, error)
    if handle is not None:
      handle.close()
    raise refused from error
  handle.truncate(0)
  handle.write(f"process {os.getpid()} on {platform.node()}\n")
  handle.flush()
  return handle


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
  """`lock` for the time of a run; of several processes the first one locks.

  Raises:
    WorkdirError: see `lock`; in all processes.
  """
  handle = refused = None
  if not jax.process_index():
    try:
      handle = lock(workdir)
    except WorkdirError as error:
      refused = error
  if jax.process_count() > 1:
    # All stop: the others would wait for the first one.
    free = multihost_utils.broadcast_one_to_all(np.int32(refused is None))
    if not free and refused is None:
      refused = WorkdirError(f"workdir={str(workdir)!r}: cannot be used")
  if refused is not None:
    raise refused
  with handle or contextlib.nullcontext():
    yield


def _refused(
  workdir: pathlib.Path, handle: TextIO | None, error: OSError
) -> WorkdirError:
  where = f"workdir={str(workdir)!r}"
  if handle is None or error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
    return WorkdirError(f"{where}: {error.strerror} ({workdir / LOCK})")
  handle.seek(0)
  who = handle.read().strip() or "another process"
  return WorkdirError(
    f"{where}: in use by {who}; wait until that ends, or use another workdir"
  )


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
  """Commit and changed files; None outside of the project's repository.

  An installed package may lie in a repository of somebody else.
  """
  top = (_git("rev-parse", "--show-toplevel") or "").strip()
  if not top or pathlib.Path(top) != ROOT.parent:
    return {"git_commit": None, "git_changes": []}
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
