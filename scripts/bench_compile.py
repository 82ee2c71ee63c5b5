"""Does the time to compile a decoder grow with its depth?

    python -m scripts.bench_compile --recipes snapkv,h2o --depths 4,30

Traces, compiles and runs a prompt and two steps of small decoders that differ
in depth alone, and prints processor seconds less those of a second run, the
number of compiled programs, and the ratio of the last depth to the first.
Recipes whose layers differ (pyramids, reductions at several blocks) have a
program for each kind of layer and grow.
"""

import argparse
import time

import jax
import numpy as np

from tokjax import recipes
from tokjax.models import Decoder, DecoderConfig, Generator
from tokjax.models.decoder_programs import programs_of

PROMPT = 512


def config(depth: int) -> DecoderConfig:
  """Grouped heads, as those of SmolLM2, and narrow."""
  return DecoderConfig(
    vocabulary=256, width=96, depth=depth, heads=6, kv_heads=2, head_dim=16,
    mlp_dim=192, length=1024,
  )  # fmt: skip


def seconds(recipe: str, depth: int) -> tuple[float, int]:
  """Processor seconds to trace and compile, and the number of programs."""
  model = Decoder(config(depth), recipes.get(recipe))
  make = jax.jit(model.init)
  params = make(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  generator = Generator(model, params, capacity=PROMPT, decode=4)
  prompt = [[i % 250 for i in range(PROMPT - 3)]]

  def run():
    began = time.process_time()
    going = generator.prefill(prompt)
    for _ in range(2):
      going = generator.step(going, np.ones(1, np.int32))
    jax.block_until_ready(going)
    return time.process_time() - began

  first, second = run(), run()
  return first - second, programs_of(model).compiled()


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--recipes", default="full,snapkv,quest,kivi")
  parser.add_argument("--depths", default="4,30")
  args = parser.parse_args()
  depths = [int(depth) for depth in args.depths.split(",")]
  seconds("full", 2)  # What every first compilation pays.
  print("recipe", *(f"{d} blocks\tprograms" for d in depths), "ratio", sep="\t")
  for recipe in args.recipes.split(","):
    found = [seconds(recipe, depth) for depth in depths]
    cells = [f"{spent:.2f}\t{programs}" for spent, programs in found]
    print(recipe, *cells, f"{found[-1][0] / found[0][0]:.2f}", sep="\t")


if __name__ == "__main__":
  main()
