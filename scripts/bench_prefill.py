"""What compression adds to a prefill, in a layer of a published model's shape.

    python scripts/bench_prefill.py [--tokens 2048] [--rounds 5]
      [--methods full,snapkv]

One layer as wide as those of Llama 3.2 1B, random weights and tokens. Methods
take turns within each round, each next to the full cache, and the best round
of either counts. Prints one tab-separated row for each method: seconds of a
prefill, and what it takes longer than the full cache's.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from tokjax import budgets, recipes
from tokjax.models import (
  Decoder,
  DecoderConfig,
  Generator,
  Rotary,
  generation,
)

CONFIG = DecoderConfig(
  vocabulary=512, width=2048, depth=1, heads=32, kv_heads=8, head_dim=64,
  mlp_dim=8192, length=131_072, rotary=Rotary(500_000.0),
)  # fmt: skip
BUDGET = budgets.Count(512)
PART = budgets.Count(256)
METHODS = {
  "full": {},
  "random_kv": {"budget": BUDGET},
  "streaming_llm": {"budget": BUDGET},
  "snapkv": {"budget": BUDGET},
  "pyramidkv": {"budget": BUDGET},
  "adakv": {"budget": BUDGET},
  "h2o": {"heavy": PART, "recent": PART},
  "knorm": {"budget": BUDGET},
  "expected_attention": {"budget": BUDGET},
  "razor_attention": {"window": BUDGET},
  "kivi": {},
  "zipcache": {},
  "quest": {"budget": BUDGET, "from_layer": 0},
  "infllm": {"local": 512},
  "actqkv": {"local": 512, "least": 1},
  "minference_a_shape": {},
  "minference_vertical_slash": {"vertical": PART, "slash": BUDGET},
  "xattention": {},
}
DECODE = 64


def compiled(name: str, params, tokens, length):
  """A method's compiled prefill."""
  model = Decoder(CONFIG, recipes.get(name, **METHODS[name]))
  # Refuses what the method cannot do at this size.
  Generator(model, params, capacity=tokens.shape[1], decode=DECODE)
  return generation.prefill.lower(
    model, params, tokens, length, DECODE
  ).compile()


def seconds(program, *inputs) -> float:
  """Of one call."""
  began = time.perf_counter()
  jax.block_until_ready(program(*inputs))
  return time.perf_counter() - began


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tokens", type=int, default=2048)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--methods", default=",".join(METHODS))
  args = parser.parse_args()
  tokens = jax.random.randint(
    jax.random.key(1), (1, args.tokens), 0, CONFIG.vocabulary
  )
  length = jnp.full((1,), args.tokens)
  params = Decoder(CONFIG, recipes.get("full")).init(
    jax.random.key(0), tokens[:, :2]
  )["params"]
  inputs = (params, tokens, length)
  names = [name for name in args.methods.split(",") if name != "full"]
  programs = {name: compiled(name, *inputs) for name in ["full", *names]}
  found = {name: [] for name in programs}
  for program in programs.values():
    program(*inputs)
  for _ in range(args.rounds):
    for name, program in programs.items():
      whole = seconds(programs["full"], *inputs)
      found[name].append((seconds(program, *inputs), whole))
  print("method\tseconds\tlonger")
  for name, pairs in found.items():
    own, whole = map(min, zip(*pairs, strict=True))
    more = 100 * (own / whole - 1)
    print(f"{name}\t{own:.3f}\t{more:+.1f} %", flush=True)


if __name__ == "__main__":
  main()
