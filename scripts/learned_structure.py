"""Masks of structure at work: tables, pages and translations on tiny models.

    python -m scripts.learned_structure [--tasks mate prefix mitre] [--seeds 3]

Each task trains the same small transformer (two layers, 64 wide) with different
masks and prints the pairs of tokens that a mask shows, as a share of all, and
the accuracy on held-out examples in percent, over seeds with 95 % intervals.

mate: a table of 5 x 5 random words with names of rows and columns; the question
names a row and a column, the answer is the word there.
prefix: a page of the standard library's documentation, eight functions with the
beginnings of their docstrings; the first tokens name one of them, and its
second word of text is asked for (functions are the same in training, so that a
model may know them by heart).
mitre: sentences of eight words into six languages, each with words and an order
of its own; the next word of the translation is asked for.
"""

import argparse
import ast
import collections
import functools
import pathlib
import re
import sysconfig
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.sweeps import intervals
from pallas_kernels import layout as layouts
from pallas_kernels.layout.dense import to_dense
from scripts import fitting
from tokjax.attention import structural

WIDTH, HEADS, DEPTH, BATCH = 64, 4, 2, 64


class Examples(NamedTuple):
  """Of one batch.

  Attributes:
    ids, position: of tokens, `[b, n]`.
    target: the answer at each token, -1 where none is asked for, `[b, n]`.
  """

  ids: np.ndarray
  position: np.ndarray
  target: np.ndarray


class Transformer(nn.Module):
  """Pre-norm, with learned positions and a mask for each head.

  Attributes:
    vocabulary, length: ids and positions there are.
  """

  vocabulary: int
  length: int

  @nn.compact
  def __call__(self, ids, position, seen):
    init = nn.initializers.normal(0.1)
    x = nn.Embed(self.vocabulary, WIDTH, embedding_init=init)(ids)
    x += nn.Embed(self.length, WIDTH, embedding_init=init)(position)
    for _ in range(DEPTH):
      y = nn.LayerNorm()(x)
      split = lambda y: nn.DenseGeneral((HEADS, WIDTH // HEADS))(y)
      q, k, v = split(y), split(y), split(y)
      z = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
      w = jax.nn.softmax(z, axis=-1, where=jnp.asarray(seen)[None])
      y = jnp.einsum("bhij,bjhd->bihd", w, v)
      x += nn.DenseGeneral(WIDTH, axis=(-2, -1))(y)
      y = nn.LayerNorm()(x)
      x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(y)))
    return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def of_heads(mask) -> np.ndarray:
  """One mask for all heads, `[h, n, n]`."""
  return np.broadcast_to(np.asarray(mask), (HEADS, *mask.shape))


# Tables.

SIDE, NAMES, CELLS = 5, 20, 40


def tables(rng, n: int) -> Examples:
  """Question, names of columns, then rows with their names."""
  name = lambda: np.stack([rng.permutation(NAMES)[:SIDE] for _ in range(n)])
  rows, columns = 1 + name(), 1 + NAMES + name()
  cells = 1 + 2 * NAMES + rng.integers(0, CELLS, (n, SIDE, SIDE))
  at = rng.integers(0, SIDE, (2, n))
  every = np.arange(n)
  question = np.stack(
    [rows[every, at[0]], columns[every, at[1]]], axis=1
  )
  body = np.concatenate([rows[..., None], cells], axis=-1).reshape(n, -1)
  ids = np.concatenate([0 * question[:, :1], question, columns, body], axis=1)
  target = np.full(ids.shape, -1)
  target[:, 0] = cells[every, at[0], at[1]]
  # Positions tell kinds of tokens; rows and columns are told by masks, or here.
  position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  return Examples(ids, position, target)


def table_masks() -> dict[str, np.ndarray]:
  """By name; the window shows as many pairs as MATE."""
  columns = np.arange(SIDE)
  row = [0] * (3 + SIDE) + [r for r in range(1, SIDE + 1)
                            for _ in range(SIDE + 1)]  # fmt: skip
  column = [0] * 3 + [*(1 + columns)] + [0, *(1 + columns)] * SIDE
  n = len(row)
  text = jnp.arange(n) < 3
  real = jnp.ones(n, bool)
  mate = functools.partial(
    structural.table_mask, jnp.asarray(row), jnp.asarray(column), text, real,
    heads=HEADS,
  )  # fmt: skip
  found = {
    "row and column heads (MATE)": np.asarray(mate(row_heads=HEADS // 2)),
    "row heads alone": np.asarray(mate(row_heads=HEADS)),
    "dense": of_heads(np.ones((n, n), bool)),
  }
  many = found["row and column heads (MATE)"].sum() // HEADS
  near = np.abs(np.arange(n)[:, None] - np.arange(n)[None])
  wide = np.sort(near.reshape(-1))[many]
  head = np.asarray(text)
  local = (near <= wide) | head[None] | head[:, None]
  return {**found, "question and a window": of_heads(local)}


# Pages.

SECTIONS, SECTION, PREFIX, KNOWN = 8, 8, 4, 1500


@functools.cache
def functions() -> list[list[int]]:
  """Names and first words of docstrings of functions, as ids."""
  found = {}
  for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        text = re.findall("[a-z]+", (ast.get_docstring(node) or "").lower())
        if len(text) >= SECTION and node.name.lower().isalpha():
          found[node.name.lower()] = text[: SECTION - 1]
  often = collections.Counter(w for text in found.values() for w in text)
  number = {w: i + 2 for i, (w, _) in enumerate(often.most_common(KNOWN // 2))}
  name = {w: 2 + KNOWN // 2 + i for i, w in enumerate(found)}
  return [[name[w], *(number.get(t, 1) for t in found[w])] for w in found]


def pages(rng, n: int) -> Examples:
  """A name, then sections, one of which begins with it."""
  known = np.array(functions())
  page = np.stack(
    [known[rng.permutation(len(known))[:SECTIONS]] for _ in range(n)]
  )
  asked = rng.integers(0, SECTIONS, n)
  every = np.arange(n)
  first = np.zeros((n, PREFIX), int)
  first[:, 0] = page[every, asked, 0]
  ids = np.concatenate([first, page.reshape(n, -1)], axis=1)
  target = np.full(ids.shape, -1)
  target[:, 0] = page[every, asked, 2]
  position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  return Examples(ids, position, target)


def page_masks() -> dict[str, np.ndarray]:
  """By name."""
  n = PREFIX + SECTIONS * SECTION
  block = dict(q_len=n, block_q=4, block_k=4)
  shown = lambda pattern: of_heads(
    to_dense(layouts.from_pattern(pattern, **block))[0]
  )
  return {
    "prefix and a window": shown(structural.prefix_global(PREFIX, 4)),
    "a window": shown(layouts.Window(6, 6)),
    "dense": of_heads(np.ones((n, n), bool)),
  }


# Translations.

WORDS, LONG, LANGUAGES = 40, 8, 6


@functools.cache
def languages() -> tuple[np.ndarray, np.ndarray]:
  """Words and orders of all languages."""
  rng = np.random.default_rng(0)
  words = np.stack([rng.permutation(WORDS) for _ in range(LANGUAGES)])
  orders = np.stack([rng.permutation(LONG) for _ in range(LANGUAGES)])
  return words, orders


def translations(rng, n: int, factor: int = 1) -> Examples:
  """[tag, source, end | registers | tag, translation]."""
  words, orders = languages()
  source = rng.integers(0, WORDS, (n, LONG))
  language = rng.integers(0, LANGUAGES, n)
  said = np.take_along_axis(words[language], source, axis=1)
  said = np.take_along_axis(said, orders[language], axis=1)
  tag = 2 + 2 * WORDS + language[:, None]
  registers = np.repeat(tag, -(-(LONG + 2) // factor), axis=1)
  end = np.ones((n, 1), int)
  ids = np.concatenate(
    [tag, 2 + source, end, registers, tag, 2 + WORDS + said[:, :-1]], axis=1
  )
  target = np.full(ids.shape, -1)
  target[:, -LONG:] = 2 + WORDS + said
  places = [*range(LONG + 2), *range(registers.shape[1]), *range(LONG)]
  # Registers have a table of positions of their own.
  places = np.array(places) + np.repeat(
    [0, LONG + 2, 2 * LONG + 4], [LONG + 2, registers.shape[1], LONG]
  )
  return Examples(ids, np.broadcast_to(places, ids.shape), target)


def register_mask(factor: int, cut: bool = False) -> np.ndarray:
  """MITRE's; `cut`: registers do not see the source."""
  count = -(-(LONG + 2) // factor)
  kind = np.repeat([0, 1, 2], [LONG + 2, count, LONG])
  seen = np.array(
    structural.register_mask(
      jnp.asarray(kind == 0), jnp.asarray(kind == 1), jnp.ones(len(kind), bool)
    )
  )
  if cut:
    seen &= ~((kind == 1)[:, None] & (kind == 0)[None])
  return of_heads(seen)


def dense_translation() -> np.ndarray:
  """Translations see the source, too."""
  count = 2 * (LONG + 2)
  n = count + LONG
  seen = np.tril(np.ones((n, n), bool))
  seen[:count, :count] = True
  return of_heads(seen)


IDS = {tables: 1 + 2 * NAMES + CELLS, pages: 2 + KNOWN // 2 + len(functions())}
TASKS = {
  "mate": {k: (tables, m) for k, m in table_masks().items()},
  "prefix": {k: (pages, m) for k, m in page_masks().items()},
  "mitre": {
    "registers (MITRE)": (translations, register_mask(1)),
    "half as many registers": (
      functools.partial(translations, factor=2), register_mask(2)
    ),
    "registers, source cut off": (translations, register_mask(1, cut=True)),
    "dense": (translations, dense_translation()),
  },
}  # fmt: skip


def measured(draw, seen, seed: int, steps: int) -> tuple[float, float]:
  """Accuracy on examples that were not seen, before and after training."""
  most = draw(np.random.default_rng(0), 256)
  vocabulary = IDS.get(draw, 2 + 2 * WORDS + LANGUAGES)
  model = Transformer(vocabulary, int(most.position.max()) + 1)

  def told(params, ids, position, target):
    logits = model.apply({"params": params}, ids, position, seen)
    asked = target >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(target, 0)
    )
    mean = lambda x: jnp.where(asked, x, 0).sum() / asked.sum()
    return mean(each), mean(logits.argmax(axis=-1) == target)

  rng = np.random.default_rng(seed + 1)
  test = draw(np.random.default_rng(10_000 + seed), 512)
  init = jax.jit(model.init)(
    jax.random.key(seed), most.ids[:1], most.position[:1], seen
  )
  params, right = init["params"], jax.jit(told)
  first = float(right(params, *test)[1])
  params = fitting.fitted(
    lambda *given: told(*given)[0], params,
    (draw(rng, BATCH) for _ in range(steps)), steps=steps, lr=2e-3, warmup=50,
  )  # fmt: skip
  return 100 * first, 100 * float(right(params, *test)[1])


def main() -> None:
  """Trains and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tasks", nargs="+", default=[*TASKS])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=1000)
  args = parser.parse_args()
  print("task", "mask", "pairs", "untrained", "trained", sep="\t")
  for task in args.tasks:
    for name, (draw, seen) in TASKS[task].items():
      x = np.array(
        [measured(draw, seen, s, args.steps) for s in range(args.seeds)]
      )
      mean, half = intervals.of_seeds(x)
      cells = f"{100 * seen.mean():.0f}", f"{mean[0]:.1f}"
      after = f"{mean[1]:.1f} ± {half[1]:.1f}"
      print(task, name, *cells, after, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
