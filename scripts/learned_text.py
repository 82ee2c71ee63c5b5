"""Attamba trained on bytes of the standard library, next to as many keys.

    python -m scripts.learned_text --workdir DIR [--seeds 3]

Trains each kind of `configs/learned/attamba.py` from scratch (texts of 64
bytes) and prints how many next bytes of held-out texts are right, in percent,
before and after that, over seeds with 95 % intervals. Runs that are there are
not made again.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs.learned import attamba
from experiments.sweeps import intervals
from experiments.training import config as config_lib
from scripts.learned_recall import accuracy, params_of

KINDS = ("chunks", "means", "window", "dense")


def untrained(config):
  """Parameters that training begins with."""
  config = config_lib.load(config)
  model = config.build_model(config.recipe.slots())
  ids = jnp.zeros((1, 64), jnp.int32)
  return jax.jit(model.init)(jax.random.key(config.seed), ids)["params"]


def measured(kind: str, seed: int, root: pathlib.Path) -> list[float]:
  """Accuracy before and after training."""
  config = attamba.get_config(f"kind={kind}")
  config.seed = seed
  first = accuracy(config, untrained(config))
  return [first, accuracy(config, params_of(config, root / f"{kind}-{seed}"))]


def main() -> None:
  """Trains, evaluates, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
  args = parser.parse_args()
  root = args.workdir.resolve()
  print("kind\tbefore\tafter")
  for kind in args.kinds:
    rows = np.array([measured(kind, seed, root) for seed in range(args.seeds)])
    both = zip(*intervals.of_seeds(rows), strict=True)
    cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in both]
    print(kind, *cells, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
