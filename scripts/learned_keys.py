"""SPT, LeMo and DHSA trained on associative recall, next to what is untrained.

    python -m scripts.learned_keys --workdir DIR [--seeds 3]

Trains a dense decoder (`configs/recall.py`, texts of 64 tokens), on it what
each method selects by and then, where the paper does so, the model with the
method (`configs/learned/selected_keys.py`). Prints the accuracy of answers on
held-out texts in percent, over seeds with 95 % intervals: on the frozen model
with as many last keys, with as many at random (LeMo: blocks), with the method
untrained and trained, and what it gains by that over its own draw; then of the
model trained with the untrained method, and with the trained one. Runs that are
there are not made again.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs import recall
from configs.learned import selected_keys
from experiments.data import pipeline
from experiments.sweeps import intervals
from experiments.training import config as config_lib
from scripts.learned_recall import accuracy, params_of
from tokjax import budgets
from tokjax.attention.eliminated import Eliminated
from tokjax.attention.matched_codes import MatchedCodes

METHODS = ("spt", "lemo", "dhsa")
# Keys that a query sees of a text, as pairs are counted.
READS = {"spt": 1 / 32, "lemo": 1 / 8, "dhsa": 1 / 4}
FINE_TUNED = ("spt", "lemo")
COLUMNS = (
  "window", "random", "untrained", "learned", "gain", "tuned, unlearned",
  "tuned, learned",
)  # fmt: skip


class RandomKeys(MatchedCodes):
  """Queries see keys drawn at random, once for all texts."""

  def _chosen(self, layer, q, k, a, memory):
    seed = int(self.bound) + layer.index
    drawn = lambda i, x: jax.random.randint(
      jax.random.key(2 * seed + i), x.shape, 0, self.words
    )
    return super()._chosen(layer, drawn(0, q), drawn(1, k), a, memory)


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Eliminated):
  """Blocks are drawn at random for each text."""

  predicts: bool = False
  seed: int = 0

  def scores(self, layer, a, made):
    key = jax.random.fold_in(jax.random.key(self.seed), layer.index)
    return jax.random.uniform(key, self._real(a).shape)


def with_fresh(config, params, seed: int):
  """The parameters, with what a method selects by drawn at random."""
  config = config_lib.load(config)
  return with_slots(config.build_model(config.recipe.slots()), params, seed)


def with_slots(model, params, seed: int):
  """As `with_fresh`, of a model."""
  ids = jnp.zeros((1, 64), jnp.int32)
  drawn = jax.jit(model.init)(jax.random.key(seed), ids)["params"]
  selects = {
    name: {**params[name], "slots": block["slots"]}
    for name, block in drawn.items()
    if "slots" in block
  }
  return {**params, **selects}


def config_of(method: str, seed: int, **values):
  """Of `selected_keys.py`."""
  given = {"method": method, **values}
  config = selected_keys.get_config(
    ",".join(f"{k}={v}" for k, v in given.items())
  )
  config.seed = seed
  return config


def at_equal_cost(method: str, seed: int, plain) -> list[float]:
  """Accuracy with the last keys, and with random ones, as many."""
  use = config_of(method, seed, stage="use")
  keep = READS[method]
  use.recipe = dict(name="minference_a_shape", keep=keep, options=dict(first=0))
  window = accuracy(use, plain)
  config = config_lib.load(use)
  if method == "lemo":
    options = {**selected_keys.OPTIONS["lemo"], "predicts": False}
    share = budgets.Share(selected_keys.KEEP["lemo"])
    attend = RandomBlocks(share, **options, seed=seed)
  else:
    attend = RandomKeys(budgets.Share(keep), bound=100.0 + 10 * seed)
  slots = dataclasses.replace(config.recipe.slots(), attend=attend)
  model = config.build_model(slots)
  batches = pipeline.heldout_batches(config.data, config.eval_batch_size, 1)
  params = with_slots(model, plain, seed)
  found = config.task.evaluate(model, params, batches)["accuracy"]
  return [window, 100 * found]


def measured(method: str, seed: int, root: pathlib.Path, plain):
  """A row of `COLUMNS`."""
  start = root / "backbone"
  run = lambda name: root / f"{method}-{name}-{seed}"
  use = config_of(method, seed, stage="use")

  def tuned(name, first):
    config = config_of(method, seed, stage="use", backbone=first)
    return accuracy(use, params_of(config, run(name)))

  row = at_equal_cost(method, seed, plain)
  row.append(accuracy(use, with_fresh(use, plain, seed)))
  learn = config_of(method, seed, backbone=start)
  row.append(accuracy(use, params_of(learn, run("learn"))))
  row.append(row[-1] - row[-2])
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
  print("method", *COLUMNS, sep="\t")
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
