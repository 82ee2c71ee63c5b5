"""Decode time against context: it follows what is kept, not what was read.

    python scripts/bench_decode.py [--shortest 1024] [--longest 131072]
      [--rounds 7] [--methods full,snapkv] [--out DIR]

A tiny decoder of random weights, one text, growing contexts. States
are made in the shapes that prefill gives them and filled with noise, every
place in use: what a step computes depends on nothing else. Methods take turns
within each round, and the best round counts. Prints one tab-separated row for
each method and context: milliseconds a step, MiB of cache, compilations in two
calls; with --out also a plot, `decode.png`.
"""

import argparse
import functools
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp

from tokjax import budgets, recipes
from tokjax.analysis import lengths
from tokjax.models import (
  Decoder,
  DecoderConfig,
  Generator,
  Rotary,
  generation,
)
from tokjax.models.decoder_programs import programs_of

CONFIG = DecoderConfig(
  vocabulary=512, width=64, depth=2, heads=4, kv_heads=2, head_dim=32,
  mlp_dim=128, length=131_072, rotary=Rotary(500_000.0),
)  # fmt: skip
BUDGET = budgets.Count(1024)
METHODS = {
  "full": {},
  "streaming_llm": {"budget": BUDGET},
  "snapkv": {"budget": BUDGET},
  "adakv": {"budget": BUDGET},
  "quest": {"budget": BUDGET, "from_layer": 0},
  "delta": {"budget": BUDGET, "layers": (0,)},
  "kivi": {},
}
DECODE = 64


def states_like(shapes, context: int):
  """Arrays of these shapes: noise, and every place in use."""

  def fill(path, x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      seed = zlib.crc32(jax.tree_util.keystr(path).encode())
      return jax.random.normal(jax.random.key(seed), x.shape, x.dtype)
    if x.dtype == bool:
      return jnp.ones(x.shape, bool)
    return jnp.full(x.shape, min(context, jnp.iinfo(x.dtype).max), x.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def params_of(config, dtype):
  """Random parameters, made once: no method here has any of its own."""
  model = Decoder(config, recipes.get("full"), dtype)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(model.init)(jax.random.key(0), tokens)["params"]


def program(
  name: str, context: int, config=CONFIG, batch: int = 1, dtype=jnp.float32
):
  """The model, its compiled step, its state and the number of its bytes."""
  model = Decoder(config, recipes.get(name, **METHODS[name]), dtype)
  params = params_of(config, dtype)
  # Refuses what the method cannot do at this size.
  generator = Generator(model, params, capacity=context, decode=DECODE)
  prompt = jax.ShapeDtypeStruct((batch, context), jnp.int32)
  length = jax.ShapeDtypeStruct((batch,), jnp.int32)
  first = lambda params, tokens, length: generation.prefill(
    model, params, tokens, length, DECODE
  )
  shapes = jax.eval_shape(first, params, prompt, length)
  states = states_like(shapes.states, context)
  going = generation.Generation(
    states,
    jnp.zeros(shapes.logits.shape, jnp.float32),
    jnp.full((batch,), context, jnp.int32),
    jnp.ones((batch,), bool),
  )
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))

  def step(going):
    token = jnp.ones((batch,), jnp.int32)
    return generator.step(going, token)

  return model, step, going, size


def measure(
  context: int, rounds: int, methods: list[str]
) -> list[tuple[str, float, int, int]]:
  """Rows of one context: method, milliseconds, bytes, compilations."""
  made, compilations = {}, {}
  for name in methods:
    model, step, going, size = program(name, context)
    going = jax.block_until_ready(step(step(going)))
    compilations[name] = programs_of(model).compiled() or 1  # One program.
    made[name] = [step, going, size, []]
  for _ in range(rounds):
    for entry in made.values():
      step, going, _, seconds = entry
      began = time.perf_counter()
      for _ in range(4):
        going = jax.block_until_ready(step(going))
      seconds.append((time.perf_counter() - began) / 4)
      entry[1] = going
  return [
    (name, 1e3 * min(seconds), size, compilations[name])
    for name, (_, _, size, seconds) in made.items()
  ]


def draw(rows, path: pathlib.Path) -> None:
  """Milliseconds against context, a line for each method."""
  curves: dict[str, list[tuple[int, float]]] = {}
  for name, context, ms, *_ in rows:
    curves.setdefault(name, []).append((context, ms))
  lengths.draw(
    curves, path, title="A decode step",
    note="budgets of 1024 tokens; two layers on a CPU", reference="full",
    x_label="tokens of context", y_label="milliseconds a step",
  )  # fmt: skip


def main() -> None:
  """Measures, prints, draws."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--shortest", type=int, default=1024)
  parser.add_argument("--methods", default=",".join(METHODS))
  parser.add_argument("--longest", type=int, default=131_072)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  print("method\tcontext\tms_per_step\tMiB\tcompilations")
  rows, context = [], args.shortest
  while context <= args.longest:
    for name, ms, size, compiled in measure(
      context, args.rounds, args.methods.split(",")
    ):
      rows.append((name, context, ms, size))
      print(
        f"{name}\t{context}\t{ms:.3f}\t{size / 2**20:.2f}\t{compiled}",
        flush=True,
      )
    context *= 4 if context < 16_384 else 2
  if args.out is not None:
    args.out.mkdir(parents=True, exist_ok=True)
    draw(rows, args.out / "decode.png")


if __name__ == "__main__":
  main()
