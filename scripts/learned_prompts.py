"""AOC on first lines of docstrings: a frozen model repeats them from memory.

    python -m scripts.learned_prompts [--seeds 3] [--steps 800]

A small language model of bytes is trained on first lines of docstrings of the
standard library, each told twice, so that it learns to repeat what it has read
(two blocks, 64 wide), then, with the model frozen, an encoder and its memory of
6 places (`tokjax.models.prompt_compression`). What is measured is the share of
held-out bytes that are predicted rightly when the model repeats a text of up to
32 bytes with the right bytes before each: with nothing in memory, with its own
keys and values of some tokens, or of their means, and with the encoder's,
before and after training, of this text or of another.
"""

import argparse
import ast
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.sweeps import intervals
from scripts import fitting
from tokjax.attention import core
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.prompt_compression import (
  PromptCompressor,
  Repetition,
  from_decoder,
)

LONG, MEMORY, BATCH = 32, 6, 64
BEGIN, END = 1, 2
CONFIG = DecoderConfig(
  vocabulary=128, length=128, width=64, depth=2, heads=4, kv_heads=2,
  mlp_dim=192, tied=False,
)  # fmt: skip
MODEL, TASK = PromptCompressor(CONFIG, MEMORY), Repetition(BEGIN, END)


def sentences() -> tuple[np.ndarray, np.ndarray]:
  """Bytes `[n, LONG]`, zeros behind them, and lengths; different texts."""
  found = {}
  for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        line = (ast.get_docstring(node) or "").split("\n")[0]
        if line.isascii() and len(line) > 8:
          found[line[:LONG]] = None
  rows, length = np.zeros((len(found), LONG), np.int32), []
  for row, line in zip(rows, found, strict=True):
    row[: len(line)] = list(line.encode())
    length.append(len(line))
  return rows, np.array(length, np.int32)


def trained(loss, params, rows, length, seed: int, steps: int, lr: float):
  """Parameters after so many steps of Adam on random batches."""
  rng = np.random.default_rng(seed)
  draws = (rng.integers(0, len(rows), BATCH) for _ in range(steps))
  batches = ((rows[at], length[at]) for at in draws)
  return fitting.fitted(
    loss, params, batches, steps=steps, lr=lr, warmup=50, clip=1.0
  )


def language_model(rows, length, seed: int, steps: int):
  """Parameters of the model, trained on texts that are told twice."""
  model = Decoder(CONFIG)

  def loss(params, rows, length):
    begin = jnp.full((len(rows), 1), BEGIN)
    at, end = jnp.arange(2 * LONG + 4)[None], length[:, None] + 1
    # Begin, text, end and once more; padding behind.
    once = jnp.concatenate([begin, rows], axis=1)
    place = jnp.where(at > end, at - end - 1, at)
    text = jnp.take_along_axis(once, jnp.minimum(place, LONG), axis=1)
    text = jnp.where(place == end, END, text)
    logits, _ = model.apply({"params": params}, text[:, :-1])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    asked = at[:, 1:] < 2 * end + 2
    return jnp.where(asked, each, 0).sum() / asked.sum()

  short = jnp.zeros((1, 8), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(seed), short)["params"]
  return trained(loss, params, rows, length, seed, steps, 3e-3)


def own_memory(params, rows, length, means: bool):
  """The model's keys and values of some tokens, or means over their spans."""
  bound = MODEL.bind({"params": params})
  place = jnp.broadcast_to(jnp.arange(LONG)[None], rows.shape)
  valid = place < length[:, None]
  x, made = bound.decoder.enter(rows, place, valid).x, []
  first = jnp.arange(MEMORY)[None] * length[:, None] // MEMORY
  last = (jnp.arange(MEMORY)[None] + 1) * length[:, None] // MEMORY - 1
  here = place[:, None]
  taken = here == last[..., None]
  if means:
    taken = (here >= first[..., None]) & (here <= last[..., None])
  weight = taken / jnp.maximum(taken.sum(-1, keepdims=True), 1)
  causal = jnp.tril(jnp.ones((LONG, LONG), bool))[None] & valid[:, None]
  for layer, block in zip(
    bound.decoder.layers, bound.decoder.blocks, strict=True
  ):
    q, k, v = block.attention(block.norm1(x))
    some = lambda x, w=weight: jnp.einsum("bmn,bngk->bmgk", w, x)
    made.append((layer.rotate(some(k), last), some(v)))
    q, k = layer.rotate(q, place), layer.rotate(k, place)
    x = x + block.attention.output(core.attended(layer, q, k, v, causal))
    x = x + block.mlp(block.norm2(x))
  return tuple(made)


class Given:
  """A compressor whose memory is `own_memory`, or nothing at all."""

  def __init__(self, kind: str):
    self.kind = kind

  def apply(self, variables, prompt, length, text):
    params = variables["params"]
    if self.kind == "nothing":
      return Decoder(CONFIG).apply({"params": params["decoder"]}, text)[0]
    made = own_memory(params, prompt, length, self.kind == "means")
    return MODEL.bind(variables).decode(made, text)


class Other:
  """A compressor that is given the text before."""

  def apply(self, variables, prompt, length, text):
    other = jnp.roll(prompt, 1, axis=0), jnp.roll(length, 1)
    return MODEL.apply(variables, *other, text)


def right(model, params, rows, length) -> float:
  """Percent of the bytes that are predicted rightly."""
  run = jax.jit(lambda params, *a: TASK(model, params, *a)[1])
  return 100 * float(run(params, rows, length))


def main() -> None:
  """Trains and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=800)
  args = parser.parse_args()
  rows, length = sentences()
  held = np.arange(len(rows)) % 10 == 0
  test = rows[held], length[held]
  data = rows[~held], length[~held]
  found = {}
  for seed in range(args.seeds):
    decoder = language_model(*data, seed, args.steps)
    args0 = (rows[:1], length[:1], rows[:1])
    drawn = jax.jit(MODEL.init)(jax.random.key(seed), *args0)["params"]
    params = from_decoder(drawn, decoder)
    learned = {k: v for k, v in params.items() if k != "decoder"}
    whole = lambda x, decoder=decoder: {**x, "decoder": decoder}
    loss = lambda x, *a, whole=whole: TASK(MODEL, whole(x), *a)[0]
    after = trained(loss, learned, *data, seed, args.steps, 2e-3)
    row = {
      "nothing": right(Given("nothing"), params, *test),
      "its own, last tokens of spans": right(Given("tokens"), params, *test),
      "its own, means of spans": right(Given("means"), params, *test),
      "AOC, untrained": right(MODEL, params, *test),
      "AOC": right(MODEL, whole(after), *test),
      "AOC, of another text": right(Other(), whole(after), *test),
    }
    for name, value in row.items():
      found.setdefault(name, []).append(value)
    print(seed, row, flush=True)
  print(f"{len(rows)} texts, {held.sum()} of them held out")
  for name, values in found.items():
    mean, half = intervals.of_seeds(np.array(values))
    print(f"{name}\t{mean:.1f} ± {half:.1f}", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
