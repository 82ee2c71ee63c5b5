"""Training runs that sweeps need before they can compare anything."""

import dataclasses
import pathlib
from typing import Any

import jax

from experiments import train


def trained(config: Any, folder: pathlib.Path) -> Any:
  """Parameters of a run in `folder`, trained unless that is done.

  Args:
    config: see `experiments.train.main`.
    folder: of the run; it goes on where it was stopped.

  Raises:
    SystemExit: the run was stopped by a signal; its state is saved.
  """
  run = train.main(config, folder)
  if not run.finished:
    raise SystemExit("training was interrupted; start again to go on")
  return run.params


def trained_seeds(
  config: Any, seeds: int, workdir: pathlib.Path
) -> tuple[tuple[Any, ...], str]:
  """Parameters of runs with several seeds, and where they come from, in words.

  Args:
    config: of the first run, an `experiments.training.config.Config`.
    seeds: how many; the seed of each is one higher.
    workdir: trains under "train", "train_1", ... in it unless that is done.
  """
  weights = []
  for i in range(seeds):
    seeded = dataclasses.replace(config, seed=config.seed + i)
    folder = workdir / (f"train_{i}" if i else "train")
    weights.append(jax.device_put(trained(seeded, folder), jax.devices()[0]))
  many = f", {seeds} seeds" if seeds > 1 else ""
  return tuple(weights), f"trained here for {config.steps} steps{many}"
