"""Masks of structure at work: tables, pages and translations on tiny models.

    python -m scripts.learned_structure [--tasks mate prefix mitre] [--seeds 3]
      [--masks row random] [--depth 1]

Each task trains the same small transformer (`--depth` layers, 64 wide) with
different masks and prints the pairs of tokens that a mask shows, as a share of
all, and the accuracy on held-out examples in percent, over seeds with 95 %
intervals. With one layer, tokens tell each other nothing on the way.

mate: a table of 5 x 5 cells under numbers of columns and behind numbers of
rows. Half of the cells hold the word of both numbers, one for each pair of
them; the others are masked and asked for: a cell needs its own row and column.
prefix: a page of the standard library's documentation, eight names of
functions, each with the beginning of another one's docstring, so that nothing
of it is known by heart. The first token has the number of a section, whose name
is asked for.
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
from collections.abc import Callable
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

WIDTH, HEADS, BATCH = 64, 4, 64
# Of each head, `[h, n, n]`; drawn ones are functions of a seed.
Mask = np.ndarray | Callable[[int], np.ndarray]


class Examples(NamedTuple):
  """Of one batch.

  Attributes:
    ids: of tokens, `[b, n]`.
    position: places of tokens, each with an embedding, `[b, n, k]`.
    target: the answer at each token, -1 where none is asked for, `[b, n]`.
  """

  ids: np.ndarray
  position: np.ndarray
  target: np.ndarray


class Transformer(nn.Module):
  """Pre-norm, with learned positions and a mask for each head.

  Attributes:
    vocabulary, length: ids and positions there are.
    depth: layers.
  """

  vocabulary: int
  length: int
  depth: int

  @nn.compact
  def __call__(self, ids, position, seen):
    init = nn.initializers.normal(0.1)
    x = nn.Embed(self.vocabulary, WIDTH, embedding_init=init)(ids)
    place = nn.Embed(self.length, WIDTH, embedding_init=init)
    x += place(position).sum(axis=-2)
    for _ in range(self.depth):
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

SIDE, NUMBERS = 5, 8
EMPTY, HIDDEN = 0, 1


def spread() -> tuple[np.ndarray, np.ndarray]:
  """Rows and columns of a table's tokens, row by row; 0 are headings."""
  at = np.arange(SIDE + 1)
  return np.repeat(at, SIDE + 1), np.tile(at, SIDE + 1)


def tables(rng, n: int) -> Examples:
  """A corner, numbers of columns, then rows with their numbers."""
  rows, columns = rng.integers(0, NUMBERS, (2, n, SIDE))
  cells = rows[:, :, None] * NUMBERS + columns[:, None]
  asked = rng.random(cells.shape) < 0.5
  number = lambda x, kind: 2 + kind * NUMBERS + x
  table = np.full((n, SIDE + 1, SIDE + 1), EMPTY)
  table[:, 1:, 0], table[:, 0, 1:] = number(rows, 0), number(columns, 1)
  table[:, 1:, 1:] = np.where(asked, HIDDEN, number(cells, 2))
  target = np.full(table.shape, -1)
  target[:, 1:, 1:] = np.where(asked, number(cells, 2), -1)
  row, column = spread()
  # As in TAPAS, tokens know the numbers of their row and column.
  position = np.stack([row, SIDE + 1 + column], axis=-1)
  ids = table.reshape(n, -1)
  return Examples(
    ids, np.broadcast_to(position, (*ids.shape, 2)), target.reshape(n, -1)
  )


def at_random(like: np.ndarray, seed: int = 0) -> np.ndarray:
  """A mask of as many pairs for each head, tokens themselves among them."""
  rng, n = np.random.default_rng(seed), like.shape[1]
  draw = rng.random(like.shape) - 2 * np.eye(n)[None]
  many = like.sum() // HEADS
  least = np.sort(draw.reshape(HEADS, -1), axis=1)[:, many - 1, None, None]
  return draw <= least


def near(like: np.ndarray) -> np.ndarray:
  """A window of about as many pairs, not fewer."""
  n = like.shape[1]
  apart = np.abs(np.arange(n)[:, None] - np.arange(n)[None])
  return of_heads(apart <= np.sort(apart.reshape(-1))[like.sum() // HEADS])


def table_masks() -> dict[str, Mask]:
  """By name; a window and random pairs are as many as MATE's.

  Random ones are of a seed, others the same for all.
  """
  row, column = (jnp.asarray(x) for x in spread())
  n = len(row)
  mate = functools.partial(
    structural.table_mask, row, column, jnp.zeros(n, bool), jnp.ones(n, bool),
    heads=HEADS,
  )  # fmt: skip
  both = np.asarray(mate(row_heads=HEADS // 2))
  return {
    "row and column heads (MATE)": both,
    "row heads alone": np.asarray(mate(row_heads=HEADS)),
    "a window": near(both),
    "random pairs": functools.partial(at_random, both),
    "dense": of_heads(np.ones((n, n), bool)),
  }


# Pages.

SECTIONS, SECTION, PREFIX, KNOWN, NAMES = 8, 4, 2, 200, 60


@functools.cache
def functions() -> tuple[np.ndarray, np.ndarray]:
  """Names of functions, and first words of docstrings, as ids."""
  found = {}
  for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        text = re.findall("[a-z]+", (ast.get_docstring(node) or "").lower())
        if len(text) >= 8 and node.name.lower().isalpha():
          found[node.name.lower()] = text[: SECTION - 1]
  often = collections.Counter(w for text in found.values() for w in text)
  first = 2 + SECTIONS + NAMES
  number = {w: i + first for i, (w, _) in enumerate(often.most_common(KNOWN))}
  texts = [[number.get(w, 1) for w in text] for text in found.values()]
  return 2 + SECTIONS + np.arange(NAMES), np.array(texts)


def pages(rng, n: int) -> Examples:
  """The number of a section, then sections: a name, and words of some text."""
  names, texts = functions()
  each = lambda of: np.stack(
    [rng.permutation(len(of))[:SECTIONS] for _ in range(n)]
  )
  page = np.concatenate(
    [names[each(names)][..., None], texts[each(texts)]], axis=-1
  )
  asked = rng.integers(0, SECTIONS, n)
  first = np.zeros((n, PREFIX), int)
  first[:, 0] = 2 + asked
  ids = np.concatenate([first, page.reshape(n, -1)], axis=1)
  target = np.full(ids.shape, -1)
  target[:, 0] = page[np.arange(n), asked, 0]
  position = np.arange(ids.shape[1])[:, None]
  return Examples(ids, np.broadcast_to(position, (*ids.shape, 1)), target)


def page_masks() -> dict[str, Mask]:
  """By name; the window and random pairs are as many as the first's."""
  n = PREFIX + SECTIONS * SECTION
  block = dict(q_len=n, block_q=2, block_k=2)
  shown = lambda pattern: of_heads(
    to_dense(layouts.from_pattern(pattern, **block))[0]
  )
  both = shown(structural.prefix_global(PREFIX, 2))
  return {
    "prefix and a window (Prefix Global)": both,
    "a window": near(both),
    "random pairs": functools.partial(at_random, both),
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
  return Examples(
    ids, np.broadcast_to(places[:, None], (*ids.shape, 1)), target
  )


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


IDS = {tables: 2 + (2 + NUMBERS) * NUMBERS, pages: 2 + SECTIONS + NAMES + KNOWN}
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


def measured(
  draw, seen, seed: int, steps: int, depth: int
) -> tuple[float, float]:
  """Accuracy on examples that were not seen, before and after training."""
  most = draw(np.random.default_rng(0), 256)
  vocabulary = IDS.get(draw, 2 + 2 * WORDS + LANGUAGES)
  model = Transformer(vocabulary, int(most.position.max()) + 1, depth)

  # Masks are given: one program for all of a task.
  def told(params, ids, position, target, seen):
    logits = model.apply({"params": params}, ids, position, seen)
    asked = target >= 0
    each = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(target, 0)
    )
    mean = lambda x: jnp.where(asked, x, 0).sum() / asked.sum()
    return mean(each), mean(logits.argmax(axis=-1) == target)

  rng = np.random.default_rng(seed + 1)
  test = draw(np.random.default_rng(10_000 + seed), 256)
  init = jax.jit(model.init)(
    jax.random.key(seed), most.ids[:1], most.position[:1], seen
  )
  params, right = init["params"], jax.jit(told)
  first = float(right(params, *test, seen)[1])
  params = fitting.fitted(
    lambda *given: told(*given)[0],
    params,
    ((*draw(rng, BATCH), seen) for _ in range(steps)),
    steps=steps,
    lr=2e-3,
    warmup=50,
  )
  return 100 * first, 100 * float(right(params, *test, seen)[1])


def main() -> None:
  """Trains and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tasks", nargs="+", default=[*TASKS])
  parser.add_argument("--masks", nargs="+", default=[""],
                      help="beginnings of their names; all")  # fmt: skip
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--depth", type=int, default=2, help="layers")
  args = parser.parse_args()
  print("task", "mask", "pairs", "untrained", "trained", sep="\t")
  for task in args.tasks:
    for name, (draw, seen) in TASKS[task].items():
      if not name.startswith(tuple(args.masks)):
        continue
      of = lambda seed, x=seen: x(seed) if callable(x) else x
      run = lambda seed, draw=draw, of=of: measured(
        draw, of(seed), seed, args.steps, args.depth
      )
      x = np.array([run(seed) for seed in range(args.seeds)])
      mean, half = intervals.of_seeds(x)
      cells = f"{100 * of(0).mean():.0f}", f"{mean[0]:.1f}"
      after = f"{mean[1]:.1f} ± {half[1]:.1f}"
      print(task, name, *cells, after, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
