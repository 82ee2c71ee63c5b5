"""A training step of attention that learns, next to dense attention.

    python -m scripts.bench_training [--tokens 4096 8192 16384]

One text through a decoder of four layers (width 128), loss and gradients of all
parameters: CPU seconds of the whole process, the least of three steps, and the
memory that the compiled program needs besides its arguments and results. Each
method reads about 1024 tokens; LeMo keeps half of the blocks in two layers of
the four. Gradients go through what is selected, not through the selection.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokjax import budgets, recipes
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.slots import Slots

READ = budgets.Count(1024)
METHODS = {
  "dense": Slots(),
  "cca": recipes.get("cca", local=READ),
  "dhsa": recipes.get("dhsa", budget=READ),
  "lemo": recipes.get("lemo", budget=budgets.Share(0.5), from_layer=1),
  "lemo, a quarter": recipes.get(
    "lemo", budget=budgets.Share(0.25), from_layer=1
  ),
}


def step_of(slots: Slots, tokens: int):
  """The compiled step, its parameters and a text."""
  config = DecoderConfig(
    vocabulary=256, length=tokens, width=128, depth=4, heads=4, kv_heads=2,
    mlp_dim=384,
  )  # fmt: skip
  model = Decoder(config, slots)
  rng = np.random.default_rng(0)
  text = jnp.asarray(rng.integers(0, 256, (1, tokens + 1)), jnp.int32)

  @jax.jit
  def step(params, text):
    def loss(params):
      logits, _ = model.apply({"params": params}, text[:, :-1], train=True)
      each = optax.softmax_cross_entropy_with_integer_labels(
        logits, text[:, 1:]
      )
      return each.mean()

    return jax.value_and_grad(loss)(params)

  short = jnp.zeros((1, 128), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), short)["params"]
  return step.lower(params, text).compile(), params, text


def measured(slots: Slots, tokens: int, rounds: int) -> tuple[float, float]:
  """CPU seconds of a step, and MiB of memory in between."""
  step, params, text = step_of(slots, tokens)
  times = []
  for _ in range(rounds + 1):
    start = time.process_time()
    jax.block_until_ready(step(params, text))
    times.append(time.process_time() - start)
  return min(times[1:]), step.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
  """Measures and prints a row for each method and length."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tokens", type=int, nargs="+",
                      default=[4096, 8192, 16384])  # fmt: skip
  parser.add_argument("--methods", nargs="+", default=[*METHODS])
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  print("method", "tokens", "CPU seconds", "MiB", sep="\t")
  for tokens in args.tokens:
    for name in args.methods:
      seconds, memory = measured(METHODS[name], tokens, args.rounds)
      cells = f"{seconds:.1f}", f"{memory:.0f}"
      print(name, tokens, *cells, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
