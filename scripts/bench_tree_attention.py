"""Looking up names in a sorted list: Tree Cross Attention next to exact one.

    python -m scripts.bench_tree_attention [--seeds 3] [--steps 1500]

A context is a list of names of functions and classes of the standard library
in alphabetical order, each with a random one of eight labels; a query is a name
of the list and asks for its label. A small encoder of letters is trained
together with what reads the list, on four fifths of the names; lists of the
other names are looked up in. Prints one tab-separated row for each reader, over
seeds with a 95 % interval: how often the label is right, how often the walk
ends at the name, and how many vectors a query reads.
"""

import argparse
import ast
import collections
import functools
import pathlib
import sysconfig

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.sweeps import intervals
from tokjax.learned import tree_attention
from tokjax.learned.tree_attention import TreeCrossAttention

LETTERS, WIDTH, LABELS, BATCH, QUERIES = 10, 32, 8, 32, 8
RATE = 1e-2
ALPHABET = "_abcdefghijklmnopqrstuvwxyz"


def names() -> list[str]:
  """Different within their first LETTERS letters, sorted."""
  found = set()
  for path in pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"):
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        name = node.name.lower().strip("_")[:LETTERS]
        if len(name) > 2 and set(name) <= set(ALPHABET):
          found.add(name)
  return sorted(found)


def letters(rows: list[str]) -> np.ndarray:
  """Numbers of letters `[n, LETTERS]`; 0 is none."""
  out = np.zeros((len(rows), LETTERS), np.int32)
  for row, name in zip(out, rows, strict=True):
    row[: len(name)] = [ALPHABET.index(c) + 1 for c in name]
  return out


class Reader(nn.Module):
  """From names, labels and queries to what was read and labels' logits.

  Attributes:
    pooled: means of the list that are read instead of a tree; 0: a tree.
  """

  pooled: int = 0

  @nn.compact
  def __call__(self, name, label, query, *, key=None):
    table = self.param(
      "letters", nn.initializers.normal(1), (LETTERS, len(ALPHABET) + 1, WIDTH)
    )
    hidden, last = nn.Dense(2 * WIDTH), nn.Dense(WIDTH)

    def encoded(x):
      x = table[jnp.arange(LETTERS), x].sum(axis=-2) * LETTERS**-0.5
      return last(nn.relu(hidden(x)))

    labels = nn.Embed(LABELS, WIDTH, embedding_init=nn.initializers.normal(1))
    tokens = encoded(name) + labels(label)
    if self.pooled:
      parts = jnp.array_split(tokens, self.pooled, axis=1)
      tokens = jnp.stack([part.mean(axis=1) for part in parts], axis=1)
    mask = jnp.ones(tokens.shape[:2], bool)
    read = TreeCrossAttention()(encoded(query), tokens, mask, key=key)
    head = nn.Dense(LABELS)
    return read, head(read.out), head(read.full)


def lists(rng, names: int, size: int, count: int) -> np.ndarray:
  """Sorted numbers of different names, `[count, BATCH, size]`."""
  one = lambda: np.sort(rng.choice(names, size, replace=False))
  rows = [one() for _ in range(count * BATCH)]
  return np.array(rows, np.int32).reshape(count, BATCH, size)


def asked(key, table, index):
  """Names, labels, queries and the places that these ask for."""
  keys = jax.random.split(key)
  label = jax.random.randint(keys[0], index.shape, 0, LABELS)
  place = jax.random.randint(keys[1], (BATCH, QUERIES), 0, index.shape[1])
  query = table[jnp.take_along_axis(index, place, axis=1)]
  return table[index], label, query, place


def wanted(label, place):
  """Labels of the names that are asked for."""
  return jnp.take_along_axis(label, place, axis=1)


def losses(model, params, batch, key, kind: str):
  """The sum that a kind of reader is trained with."""
  name, label, query, place = batch
  right = wanted(label, place)
  read, few, full = model.apply({"params": params}, name, label, query, key=key)
  ce = lambda logits: optax.softmax_cross_entropy_with_integer_labels(
    logits, right
  )
  if kind in ("exact", "pooled"):
    return ce(full).mean()
  total = ce(few).mean() + ce(full).mean()
  if kind == "tree":
    reward = few.argmax(axis=-1) == right
    total += tree_attention.policy_loss(read, reward.astype(jnp.float32))
  return total


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def trained(model, kind, table, index, key):
  """Parameters after training on lists of these names."""
  optimiser = optax.adam(
    optax.warmup_cosine_decay_schedule(0, RATE, 50, max(len(index), 51))
  )
  start, key = jax.random.split(key)
  params = model.init(start, *asked(start, table, index[0])[:3])["params"]

  def step(carry, number):
    params, state = carry
    data, walk = jax.random.split(jax.random.fold_in(key, number))
    slope = jax.grad(losses, 1)(
      model, params, asked(data, table, index[number]), walk, kind
    )
    update, state = optimiser.update(slope, state)
    return (optax.apply_updates(params, update), state), None

  # The first list initialises.
  state = params, optimiser.init(params)
  return jax.lax.scan(step, state, jnp.arange(1, len(index)))[0][0]


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def tested(model, kind, params, table, index):
  """Shares of right labels and of walks that end at the name; reads a query."""
  size = index.shape[2]
  exact = kind in ("exact", "pooled")
  each = tree_attention.shape(size, 2)[1]

  def one(index):
    name, label, query, place = asked(jax.random.key(0), table, index)
    read, *logits = model.apply({"params": params}, name, label, query)
    right = logits[exact].argmax(axis=-1) == wanted(label, place)
    met = read.group == place // each
    count = (model.pooled or size) if exact else read.read.mean()
    return right.mean(), met.mean(), jnp.float32(count)

  return jax.tree.map(lambda x: x.mean(), jax.lax.map(one, index))


def main() -> None:
  """Trains, looks up, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=1500)
  parser.add_argument("--size", type=int, default=32)
  args = parser.parse_args()
  every = names()
  reads = sum(tree_attention.shape(args.size, 2))
  found = collections.defaultdict(list)
  for seed in range(args.seeds):
    held = np.random.default_rng(seed).random(len(every)) < 0.2
    parts = [], []
    for name, apart in zip(every, held, strict=True):
      parts[apart].append(name)
    train, test = (jnp.asarray(letters(part)) for part in parts)
    rng = np.random.default_rng(seed)
    train_lists = lists(rng, len(train), args.size, args.steps + 1)
    test_lists = lists(rng, len(test), args.size, 40)
    for kind in ("exact", "pooled", "tree", "no policy loss", "untrained"):
      model = Reader(reads if kind == "pooled" else 0)
      rows = train_lists[: 1 if kind == "untrained" else None]
      params = trained(model, kind, train, rows, jax.random.key(seed))
      row = tested(model, kind, params, test, test_lists)
      found[kind].append([float(x) for x in row])
  print(f"{len(every)} names, lists of {args.size}")
  print("reader\tlabel\tname met\tvectors read")
  for kind, rows in found.items():
    x = np.array(rows)
    mean, half = (100 * value for value in intervals.of_seeds(x))
    cells = [f"{mean[i]:.1f} ± {half[i]:.1f}" for i in (0, 1)]
    print(kind, *cells, f"{x[:, 2].mean():.1f}", sep="\t")


if __name__ == "__main__":
  main()
