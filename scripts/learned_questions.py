"""Learned visual-token methods on questions about a grid, before and after.

    python -m scripts.learned_questions --workdir DIR [--seeds 3]
        [--methods trim,covipal]

Trains the model of `configs/vlm_grid.py`, goes on from it with each method of
`configs/learned/questions.py` and several seeds, and prints right answers to
held-out questions by kind in percent: of the model before that training with
the method on (its own modules drawn at random), and after it, over seeds with
a 95 % interval. The rows `plain`, `random_visual` and `avgpool_visual` train as
long. Runs that are there are not made again.
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax

from configs import vlm_grid
from configs.learned import questions
from experiments.data import pipeline
from experiments.evaluate import load_run
from experiments.sweeps import intervals, runs
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import state as state_lib
from tokjax.analysis import cost
from tokjax.models import (
  VisionLanguage,
  VisionLanguageGenerator,
  vlm_generation,
)
from tokjax.models.vlm import tokens_per_image


def params_of(config, folder: pathlib.Path) -> Any:
  """Of a run, trained unless it is done."""
  done = folder / "done"
  if not done.exists():
    runs.trained(config, folder)
    done.touch()
  return load_run(folder, mesh_lib.Mesh().build())[1]


def with_fresh(config: config_lib.Config, model: VisionLanguage, params: Any):
  """The parameters, and random ones for what only the recipe has."""
  example = next(pipeline.heldout_batches(config.data, 2, 1))
  inputs = config.task.inputs(example, model)
  init = lambda p: state_lib.init(
    config, model, inputs, optax.identity(), p
  ).params
  return jax.jit(init)(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(task, model, params, batch):
  logits, _ = model.apply(
    {"params": params}, task.inputs(batch, model), key=jax.random.key(0)
  )
  target, asked = task.targets(batch)
  right = (task.answers(logits, batch).argmax(-1) == target) * asked
  return right.sum(axis=1), asked.sum(axis=1)


def accuracy(config, model, params) -> dict[str, float]:
  """Of answers on held-out images by kind of question, in percent."""
  found = []
  for batch in pipeline.heldout_batches(config.data, config.eval_batch_size, 1):
    right, asked = _right(config.task, model, params, batch)
    found.append((np.asarray(right), np.asarray(asked)))
  right, asked = (np.concatenate(x) for x in zip(*found, strict=True))
  right = right[: config.data.heldout] > 0
  kind = np.arange(len(right)) % len(config.data.kinds)
  return {
    name: 100 * float(right[kind == i].mean())
    for i, name in enumerate(config.data.kinds)
  }


def megaflops(config, model, params) -> float:
  """Of taking the prompt of one question, by the compiler."""
  image, question = config.data.question(0)
  prompt = config.data.words.encode(question.prompt)
  longest = len(prompt) - 1 + tokens_per_image(model.config, model.slots)
  generator = VisionLanguageGenerator(
    model, params, longest, 1, buckets=(longest,), image_buckets=(1,)
  )
  packed, room = generator.pack([prompt], [[image.astype(np.float32)]])
  leaves, tree = jax.tree.flatten(packed)

  def run(params, leaves, key):
    return vlm_generation.prefill(
      model, params, tree.unflatten(leaves), 1, None, room, key
    )

  key = jax.random.key(0)
  return cost.measure(run, params, leaves, key).flops / 1e6


def finished(root: pathlib.Path, method: str, seed: int, local: str):
  """Config and parameters of a method after its last phase."""
  begin = root / "train"
  for phase in questions.PHASES.get(method, ("",)):
    given = f"backbone={begin},method={method},{local}"
    config = questions.get_config(given + (f",phase={phase}" if phase else ""))
    config.seed = seed
    begin = root / "-".join(filter(None, (method, phase, str(seed))))
    params = params_of(config, begin)
  return config_lib.load(config), params


def row(values: list[dict[str, float]]) -> str:
  """Means over seeds, and what lies within 95 % of them."""
  cells = []
  for name in values[0]:
    x = np.array([value[name] for value in values])
    mean, half = intervals.of_seeds(x)
    cells.append(f"{mean:.1f} ± {half:.1f}")
  return "\t".join(cells)


def main() -> None:
  """Trains, evaluates, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--methods", default="")
  parser.add_argument("--local", action="store_true", help="two steps")
  args = parser.parse_args()
  root, local = args.workdir.resolve(), "runlocal" if args.local else ""
  every = (*questions.WHOLE, *questions.MODULES)
  start = params_of(vlm_grid.get_config(local), root / "train")
  print("method\tMFLOPs\tseeds\tbefore\tafter", flush=True)
  for method in args.methods.split(",") if args.methods else every:
    found = {"before": [], "after": []}
    for seed in range(args.seeds):
      stem = f"{method}-{seed}"
      file = root / f"{stem}.json"
      if not file.exists():
        loaded, params = finished(root, method, seed, local)
        model = loaded.build_model()
        before = with_fresh(loaded, model, start)
        file.write_text(
          json.dumps({
            "before": accuracy(loaded, model, before),
            "after": accuracy(loaded, model, params),
            "mflops": megaflops(loaded, model, params),
          })
        )
      own = json.loads(file.read_text())
      for when, values in found.items():
        values.append(own[when])
    cells = [row(values) for values in found.values()]
    print(method, f"{own['mflops']:.2f}", args.seeds, *cells, sep="\t")


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
