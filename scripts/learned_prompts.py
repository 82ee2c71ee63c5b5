"""AOC and sentinel tokens: first lines of docstrings, repeated from memory.

    python -m scripts.learned_prompts [--methods aoc sentinels] [--seeds 3]
      [--steps 800] [--kinds dense alone]

A small language model of bytes is trained on first lines of docstrings of the
standard library, each told twice, so that it learns to repeat what it has read
(two blocks, 64 wide). What is measured is the share of held-out bytes that are
predicted rightly when the model repeats a text of up to 32 bytes with the right
bytes before each.

aoc: with the model frozen, an encoder and its memory of 6 places are trained
(`tokjax.models.prompt_compression`). With nothing in memory, with the model's
own keys and values of some tokens, or of their means, and with the encoder's,
before and after training, of this text or of another.

sentinels: the model goes on learning, with a token behind each of 6 spans of
the first telling (`sentinel_tokens`). The second one sees all of the first, as
published, or (alone) nothing but those 6; next to it, as many other tokens. All
seeds go on from one model.
"""

import argparse
import ast
import dataclasses
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.sweeps import intervals
from scripts import fitting
from tokjax.attention import core
from tokjax.attention.sentinel import Sentinels
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.prompt_compression import (
  PromptCompressor,
  Repetition,
  from_decoder,
)
from tokjax.slots import Slots

LONG, MEMORY, BATCH = 32, 6, 64
BEGIN, END, SENTINEL = 1, 2, 3
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


def trained(
  loss, params, rows, length, seed: int, steps: int, lr: float,
  batch: int = BATCH,
):  # fmt: skip
  """Parameters after so many steps of Adam on random batches."""
  rng = np.random.default_rng(seed)
  draws = (rng.integers(0, len(rows), batch) for _ in range(steps))
  batches = ((rows[at], length[at]) for at in draws)
  return fitting.fitted(
    loss, params, batches, steps=steps, lr=lr, warmup=50, clip=1.0
  )


def told_twice(rows, length):
  """Begin, text, end, and once more; padding behind."""
  begin = jnp.full((len(rows), 1), BEGIN)
  at, end = jnp.arange(2 * LONG + 4)[None], length[:, None] + 1
  once = jnp.concatenate([begin, rows], axis=1)
  place = jnp.where(at > end, at - end - 1, at)
  text = jnp.take_along_axis(once, jnp.minimum(place, LONG), axis=1)
  return jnp.where(place == end, END, text)


def ends_of_spans(length):
  """Places of the last bytes of `MEMORY` spans of each text."""
  return (jnp.arange(MEMORY)[None] + 1) * length[:, None] // MEMORY - 1


def language_model(rows, length, seed: int, steps: int):
  """Parameters of the model, trained on texts that are told twice."""
  model = Decoder(CONFIG)

  def loss(params, rows, length):
    text = told_twice(rows, length)
    logits, _ = model.apply({"params": params}, text[:, :-1])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    asked = jnp.arange(1, text.shape[1])[None] < 2 * length[:, None] + 4
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
  last = ends_of_spans(length)
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


def with_sentinels(rows, length):
  """The text, told twice with sentinels in the first telling; what is asked.

  That are the bytes of the second telling and its end, at their places.
  """
  text, n = told_twice(rows, length), 2 * LONG + 4 + MEMORY
  at = jnp.arange(n)[None]
  mark = ends_of_spans(length) + jnp.arange(MEMORY)[None] + 2
  here = at[..., None] == mark[:, None]
  source = at - (mark[:, None] < at[..., None]).sum(axis=-1)
  text = jnp.where(
    here.any(axis=-1), SENTINEL, jnp.take_along_axis(text, source, axis=1)
  )
  long = length[:, None]
  return text, (source >= long + 3) & (source <= 2 * long + 3)


@dataclasses.dataclass(frozen=True)
class Kept(Sentinels):
  """The second telling sees some tokens of the first only, and its beginning.

  Attributes:
    kept: "all", "bytes" (all but sentinels), "sentinels", "last" (of each
      span), "random" (as many) or "none".
  """

  kept: str = "all"

  def _stays(self, token, first):
    mark = token == SENTINEL
    byte = first & ~mark & (token != BEGIN) & (token != END)
    if self.kept == "random":
      draw = jax.random.uniform(jax.random.key(0), token.shape[1:])
      draw = jnp.where(byte, draw[None], -1.0)
      return byte & (draw >= jnp.sort(draw, axis=1)[:, -MEMORY][:, None])
    return {
      "all": first,
      "bytes": first & ~mark,
      "sentinels": mark,
      "last": jnp.pad(mark[:, 1:], [(0, 0), (0, 1)]),
      "none": jnp.zeros_like(mark),
    }[self.kept]

  def seen(self, layer, arrivals, memory):
    shown = super().seen(layer, arrivals, memory)
    end = memory.token == END
    first = (jnp.cumsum(end, axis=1) - end) == 0
    stays = self._stays(memory.token, first) | (memory.position == 0)

    def rows(at):
      may = (stays | ~first)[:, None] | first[:, at][:, :, None]
      if self.kept == "bytes":
        may &= (memory.token != SENTINEL)[:, None]
      return shown(at) & may[:, None]

    return rows


MARKS = (SENTINEL,)
KINDS = {
  "all bytes": Kept(kept="bytes"),
  "all bytes and sentinels": Kept(MARKS),
  "sentinels alone": Kept(MARKS, kept="sentinels"),
  "sentinels alone, which see all before them": Kept(kept="sentinels"),
  "last bytes of spans alone": Kept(kept="last"),
  "random bytes alone": Kept(kept="random"),
  "nothing": Kept(kept="none"),
}


def sentinels(kind: str, decoder, data, test, seed: int, steps: int):
  """Percent of bytes that are right, before and after training the model."""
  model = Decoder(CONFIG, Slots(attend=KINDS[kind]))

  def told(params, rows, length):
    text, asked = with_sentinels(rows, length)
    logits, _ = model.apply({"params": params}, text[:, :-1])
    target, asked = text[:, 1:], asked[:, 1:]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    mean = lambda x: jnp.where(asked, x, 0).sum() / asked.sum()
    return mean(each), mean(logits.argmax(axis=-1) == target)

  run = jax.jit(told)
  loss = lambda *a: told(*a)[0]
  after = trained(loss, decoder, *data, seed, steps, 2e-3, BATCH // 2)
  return [100 * float(run(params, *test)[1]) for params in (decoder, after)]


def compressed(decoder, data, test, seed: int, steps: int) -> dict[str, float]:
  """Percent of bytes that are right, with AOC and what it is compared with."""
  args = (data[0][:1], data[1][:1], data[0][:1])
  drawn = jax.jit(MODEL.init)(jax.random.key(seed), *args)["params"]
  params = from_decoder(drawn, decoder)
  learned = {k: v for k, v in params.items() if k != "decoder"}
  whole = lambda x: {**x, "decoder": decoder}
  loss = lambda x, *a: TASK(MODEL, whole(x), *a)[0]
  after = trained(loss, learned, *data, seed, steps, 2e-3)
  return {
    "nothing": right(Given("nothing"), params, *test),
    "its own, last tokens of spans": right(Given("tokens"), params, *test),
    "its own, means of spans": right(Given("means"), params, *test),
    "AOC, untrained": right(MODEL, params, *test),
    "AOC": right(MODEL, whole(after), *test),
    "AOC, of another text": right(Other(), whole(after), *test),
  }


def tell(name: str, values) -> None:
  """Prints means and 95 % intervals over seeds, the first axis."""
  mean, half = intervals.of_seeds(np.array(values))
  cells = zip(np.ravel(mean), np.ravel(half), strict=True)
  print(name, *[f"{m:.1f} ± {h:.1f}" for m, h in cells], sep="\t", flush=True)


def main() -> None:
  """Trains and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--methods", nargs="+", choices=("aoc", "sentinels"),
                      default=["aoc", "sentinels"])  # fmt: skip
  parser.add_argument("--kinds", nargs="+", choices=[*KINDS],
                      default=[*KINDS], help="of sentinels")  # fmt: skip
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=800)
  args = parser.parse_args()
  rows, length = sentences()
  held = np.arange(len(rows)) % 10 == 0
  test = rows[held], length[held]
  data = rows[~held], length[~held]
  print(f"{len(rows)} texts, {held.sum()} of them held out", flush=True)
  first = language_model(*data, 0, args.steps)
  if "aoc" in args.methods:
    more = (language_model(*data, i, args.steps) for i in range(1, args.seeds))
    found = [
      compressed(model, data, test, seed, args.steps)
      for seed, model in enumerate([first, *more])
    ]
    for name in found[0]:
      tell(name, [x[name] for x in found])
  if "sentinels" in args.methods:
    for kind in args.kinds:
      tell(kind, [
        sentinels(kind, first, data, test, seed, args.steps)
        for seed in range(args.seeds)
      ])  # fmt: skip


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
