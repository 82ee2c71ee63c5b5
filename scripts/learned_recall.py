"""CCA trained on associative recall, next to what reads as many vectors.

    python -m scripts.learned_recall --workdir DIR [--seeds 3]

Trains a dense decoder (`configs/recall.py`, texts of 64 tokens), then each kind
of `configs/learned/cca.py` from it, and prints the accuracy of answers on
held-out texts in percent, before and after that training, over seeds with a
95 % interval. Runs that are there are not made again.
"""

import argparse
import collections
import pathlib

import jax
import numpy as np

from configs import recall
from configs.learned import cca
from experiments.data import pipeline
from experiments.evaluate import load_run
from experiments.sweeps import intervals, runs
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib

KINDS = ("weighted", "plain", "window", "dense")


def params_of(config, folder: pathlib.Path):
  """Of a run, trained unless it is done."""
  done = folder / "done"
  if not done.exists():
    runs.trained(config, folder)
    done.touch()
  return load_run(folder, mesh_lib.Mesh().build())[1]


def accuracy(config, params) -> float:
  """Of answers on held-out texts, in percent."""
  config = config_lib.load(config)
  model = config.build_model(config.recipe.slots())
  batches = pipeline.heldout_batches(config.data, config.eval_batch_size, 1)
  return 100 * config.task.evaluate(model, params, batches)["accuracy"]


def main() -> None:
  """Trains, evaluates, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, default=3)
  args = parser.parse_args()
  root = args.workdir.resolve()
  start = root / "backbone"
  before = params_of(recall.get_config("length=64"), start)
  found = collections.defaultdict(list)
  for seed in range(args.seeds):
    for kind in KINDS:
      config = cca.get_config(f"backbone={start},kind={kind}")
      config.seed = seed
      after = params_of(config, root / f"{kind}-{seed}")
      found[kind].append([accuracy(config, p) for p in (before, after)])
      print(seed, kind, *found[kind][-1], flush=True)
  print("kind\tbefore\tafter")
  for kind, rows in found.items():
    x = np.array(rows)
    mean, half = intervals.of_seeds(x)
    cells = f"{x[0, 0]:.1f}\t{mean[1]:.1f} ± {half[1]:.1f}"
    print(kind, cells, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
