"""A run of a second or two, for tests of everything around the model."""

import json
import pathlib
from typing import Any

import jax
import numpy as np


def config(**changes: Any) -> dict[str, Any]:
  """A tiny transformer on digits; `changes` replace whole entries."""
  return {
    "model": dict(
      name="vit", image_size=8, patch_size=4, channels=1, width=8, depth=1,
      heads=2, mlp_dim=16, num_classes=10,
    ),
    "data": dict(name="digits"),
    "task": dict(name="classification", label_smoothing=0.1, mixup=0.2),
    "optimizer": dict(lr=1e-3, warmup=2, ema=0.9),
    "checkpoint": dict(every=2, keep=2),
    "mesh": dict(data=-1),
    "steps": 8,
    "batch_size": 16,
    "eval_batch_size": 120,
    "log_every": 1,
    "eval_every": 100,
    "threads": 1,
    **changes,
  }  # fmt: skip


def light(**changes: Any) -> dict[str, Any]:
  """The same without blocks and mixup: compiled in a second."""
  model = {**config()["model"], "depth": 0}
  return config(
    **{"model": model, "task": dict(name="classification"), **changes}
  )


def rows(workdir: pathlib.Path, split: str = "train") -> dict[int, dict]:
  """The rows of `metrics.jsonl` by step."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return {r["step"]: r for r in found if r["split"] == split}


def losses(workdir: pathlib.Path) -> list[float]:
  """Training losses in the order of steps."""
  return [row["loss"] for _, row in sorted(rows(workdir).items())]


def assert_same(a: Any, b: Any) -> None:
  """Two pytrees are equal bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, a, b)
