"""What a measurement was made with, found without JAX."""

import datetime
import os
import pathlib
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

_PACKAGES = (
  "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax",
  "numpy", "jaxtyping", "torch", "triton", "nvidia-cudnn-cu13",
  "nvidia-cudnn-cu12", "nvidia-cublas", "nvidia-cuda-nvcc",
)  # fmt: skip
_SETTINGS = ("XLA_", "JAX_", "LIBTPU_", "CUDA_VISIBLE", "NVIDIA_TF32")
_CARD = "name,driver_version,memory.total,clocks.max.sm,power.limit"


def collect(root: pathlib.Path, commit: str | None) -> dict[str, Any]:
  """Facts by name.

  Args:
    root: of the checkout.
    commit: of the code; None: what git says.
  """
  now = datetime.datetime.now(datetime.UTC)
  found: dict[str, Any] = {
    "begun": now.strftime("%Y-%m-%d %H:%M UTC"),
    "commit": commit or _git(root),
    "python": platform.python_version(),
    "processors": os.cpu_count(),
  }
  card = _output(
    ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"]
  )
  if card:
    found["card"] = f"{card} (driver, memory, highest clock, power limit)"
  for name in _PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  for name, value in sorted(os.environ.items()):
    if name.startswith(_SETTINGS):
      found[name] = value
  return found


def _git(root: pathlib.Path) -> str:
  """The commit of a checkout, and whether files differ from it."""
  git = ["git", "-C", str(root)]
  commit = _output([*git, "rev-parse", "HEAD"])
  if not commit:
    return "unknown: not a git checkout, and no --commit was given"
  changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
  return commit + (", with changes" if changed else "")


def _output(command: list[str]) -> str:
  """What a program prints; empty if it is missing, fails or hangs."""
  if shutil.which(command[0]) is None:
    return ""
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=20, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return ""
  return done.stdout.strip()
