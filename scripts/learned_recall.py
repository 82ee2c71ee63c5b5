"""CCA and Attamba on associative recall, next to what reads as many vectors.

    python -m scripts.learned_recall --workdir DIR [--methods cca attamba]
      [--kinds states means] [--seeds 3]

Prints the accuracy of answers on held-out texts in percent, before and after
training, over seeds with a 95 % interval. cca: a dense decoder
(`configs/recall.py`) is trained, then each kind of `configs/learned/cca.py`
from it. attamba: each kind of `configs/learned/attamba.py` is trained from
scratch. Runs that are there are not made again.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs import recall
from configs.learned import attamba, cca
from experiments.data import pipeline
from experiments.evaluate import load_run
from experiments.sweeps import intervals, runs
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib

KINDS = {
  "cca": ("weighted", "plain", "window", "dense"),
  "attamba": ("states", "means", "frozen", "window", "dense", "deep"),
}


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


def untrained(config):
  """Parameters that training begins with."""
  config = config_lib.load(config)
  model = config.build_model(config.recipe.slots())
  ids = jnp.zeros((1, config.data.length), jnp.int32)
  return jax.jit(model.init)(jax.random.key(config.seed), ids)["params"]


def measured(method: str, kind: str, seed: int, root: pathlib.Path):
  """Accuracy before and after training."""
  if method == "cca":
    start = root / "backbone"
    before = params_of(recall.get_config("length=64"), start)
    config, run = cca.get_config(f"backbone={start},kind={kind}"), kind
  else:
    config, run = attamba.get_config(f"kind={kind}"), f"attamba-{kind}"
  config.seed = seed
  if method != "cca":
    before = untrained(config)
  after = params_of(config, root / f"{run}-{seed}")
  return [accuracy(config, params) for params in (before, after)]


def main() -> None:
  """Trains, evaluates, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--methods", nargs="+", choices=[*KINDS],
                      default=[*KINDS])  # fmt: skip
  parser.add_argument("--kinds", nargs="+", help="of each method; all")
  parser.add_argument("--seeds", type=int, default=3)
  args = parser.parse_args()
  root = args.workdir.resolve()
  print("method\tkind\tbefore\tafter")
  for method in args.methods:
    for kind in KINDS[method]:
      if args.kinds and kind not in args.kinds:
        continue
      rows = [measured(method, kind, seed, root) for seed in range(args.seeds)]
      both = zip(*intervals.of_seeds(np.array(rows)), strict=True)
      cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in both]
      print(method, kind, *cells, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
