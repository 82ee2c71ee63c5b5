"""SPT, LeMo and DHSA trained on associative recall, next to what is untrained.

    python -m scripts.learned_keys --workdir DIR [--seeds 3]

Trains a dense decoder (`configs/recall.py`, texts of 64 tokens), on it what
each method selects by and then, where the paper does so, the model with the
method (`configs/learned/selected_keys.py`). Prints the accuracy of answers on
held-out texts in percent, over seeds with 95 % intervals. Runs that are there
are not made again.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs import recall
from configs.learned import selected_keys
from experiments.sweeps import intervals
from experiments.training import config as config_lib
from scripts.learned_recall import accuracy, params_of

METHODS = ("window", "spt", "lemo", "dhsa")
FINE_TUNED = ("spt", "lemo")


def with_fresh(config, params, seed: int):
  """The parameters, with what a method selects by drawn at random."""
  config = config_lib.load(config)
  model = config.build_model(config.recipe.slots())
  ids = jnp.zeros((1, 64), jnp.int32)
  drawn = jax.jit(model.init)(jax.random.key(seed), ids)["params"]
  selects = {
    name: {**params[name], "slots": block["slots"]}
    for name, block in drawn.items()
    if "slots" in block
  }
  return {**params, **selects}


def config_of(method: str, seed: int, **values):
  """Of `selected_keys.py`, or of a window of an eighth of the tokens."""
  window = method == "window"
  given = {"method": "spt" if window else method, **values}
  arg = ",".join(f"{k}={v}" for k, v in given.items())
  config = selected_keys.get_config(arg)
  config.seed = seed
  if window:
    config.recipe = dict(
      name="minference_a_shape", keep=1 / 8, options=dict(first=0)
    )
  return config


def measured(method: str, seed: int, root: pathlib.Path, plain):
  """Accuracy untrained, with what selects trained, and with all trained."""
  start = root / "backbone"
  run = lambda name: root / f"{method}-{name}-{seed}"
  use = config_of(method, seed, stage="use")

  def tuned(name, first):
    config = config_of(method, seed, stage="use", backbone=first)
    return accuracy(use, params_of(config, run(name)))

  if method == "window":
    return [accuracy(use, plain), None, tuned("unlearned", start), None]
  row = [accuracy(use, with_fresh(use, plain, seed))]
  learn = config_of(method, seed, backbone=start)
  row.append(accuracy(use, params_of(learn, run("learn"))))
  if method not in FINE_TUNED:
    return [*row, None, None]
  row.append(tuned("unlearned", start))
  return [*row, tuned("use", run("learn"))]


def main() -> None:
  """Trains, evaluates, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--methods", nargs="+", default=METHODS)
  args = parser.parse_args()
  root = args.workdir.resolve()
  dense = recall.get_config("length=64")
  dense.steps = 1000
  plain = params_of(dense, root / "backbone")
  print(f"dense\t{accuracy(dense, plain):.1f}", flush=True)
  print("method\tuntrained\tlearned\ttuned, unlearned\ttuned, learned")
  for method in args.methods:
    rows = [measured(method, seed, root, plain) for seed in range(args.seeds)]
    cells = ["" if None in x else interval(x) for x in zip(*rows, strict=True)]
    print(method, *cells, sep="\t", flush=True)


def interval(values) -> str:
  """Mean and 95 % interval."""
  mean, half = intervals.of_seeds(np.array(values))
  return f"{mean:.1f} ± {half:.1f}"


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
