"""The loop's overhead over its own bare compiled step.

python scripts/bench_loop.py [--config FILE] [--steps 60] [--rounds 7]

Times, in turns, so that both see the same machine: the compiled step called
with one batch again and again, and the whole loop (data, metrics, logging,
checkpoints) over as many steps. Each run of the loop is compared with the bare
steps just before and after it, and the median of these ratios counts. Prints
seconds a step and the overhead.
"""

import argparse
import importlib.util
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax

from experiments import train
from experiments.data import pipeline
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import optim
from experiments.training import state as state_lib


class Bare:
  """The compiled step of a config, and nothing else."""

  def __init__(self, config):
    mesh = mesh_lib.for_run(config)
    model = config.build_model()
    optimizer = optim.build(config.optimizer, config.steps)
    batches = pipeline.train_batches(
      config, to_device=lambda batch: mesh_lib.put_batch(mesh, batch)
    )
    self.batch = next(batches)
    batches.close()
    example = config.task.inputs(
      pipeline.heldout_arrays(config.data, 1), model
    )
    self.state = jax.jit(
      lambda: state_lib.init(config, model, example, optimizer)
    )()
    step = state_lib.make_step(config, model, optimizer)
    step = jax.jit(step, donate_argnums=0)
    self.step = step.lower(self.state, self.batch).compile()

  def seconds(self, steps: int) -> float:
    """A step, after one more to warm up."""
    self.state, _ = self.step(self.state, self.batch)
    jax.block_until_ready(self.state)
    began = time.perf_counter()
    for _ in range(steps):
      self.state, _ = self.step(self.state, self.batch)
    jax.block_until_ready(self.state)
    return (time.perf_counter() - began) / steps


def loop_seconds(config, steps: int) -> float:
  """A step of the loop, from the log of a run that ends without evaluation.

  The first log line, with what starts up, does not count.
  """
  import json

  with tempfile.TemporaryDirectory() as workdir:
    train.main(config, workdir)
    lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows = [row["step_seconds"] for row in rows if row["split"] == "train"][1:]
  return statistics.mean(rows)


def main() -> None:
  """Prints what the loop adds to a bare jit-compiled step."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/digits.py")
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  path = pathlib.Path(args.config.partition(":")[0])
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  raw = module.get_config(args.config.partition(":")[2])
  raw.log_every = args.steps // 2
  raw.steps = args.steps + raw.log_every
  config = config_lib.load(raw)

  bare, rows = Bare(config), []
  for i in range(args.rounds):
    before = bare.seconds(args.steps)
    loop = loop_seconds(config, args.steps)
    step = (before + bare.seconds(args.steps)) / 2
    rows.append((step, loop, loop / step))
    print(f"round {i}: step {step:.5f} s, loop {loop:.5f} s", flush=True)
  step, loop, ratio = (statistics.median(x) for x in zip(*rows, strict=True))
  print(
    f"bare step {1e3 * step:.2f} ms, loop {1e3 * loop:.2f} ms a step, overhead"
    f" {100 * (ratio - 1):.1f} %, the median of {args.rounds} rounds"
  )


if __name__ == "__main__":
  main()
