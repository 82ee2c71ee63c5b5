"""SMITH on the standard library: which documents are of one module?

    python -m scripts.learned_documents [--seeds 3] [--steps 400]

A document is made of docstrings of one module, up to 8 blocks of 16 words. Two
documents match if they are of one module, of whose docstrings neither shares
one with the other. Encoders are trained on four fifths of the modules; of each
of the others one document is looked for among all with the other one. Prints
how often it is the most similar one, and how often a pair that matches is more
similar than one that does not, in percent over seeds with 95 % intervals.
"""

import argparse
import ast
import collections
import pathlib
import re
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweeps import intervals
from scripts import fitting
from tokjax.models.hierarchical_encoder import (
  HierarchicalConfig,
  HierarchicalEncoder,
  matching_loss,
)

WORDS, BLOCK, BLOCKS, BATCH = 2048, 16, 8, 16
MASK = 1
CONFIG = HierarchicalConfig(
  vocabulary=WORDS, width=64, heads=4, mlp_dim=128, block=BLOCK, blocks=BLOCKS,
  depth=2, depth_above=2,
)  # fmt: skip
MODEL = HierarchicalEncoder(CONFIG)


def modules() -> list[list[list[int]]]:
  """For each module its docstrings, as ids of words."""
  found = []
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/[a-z]*.py")]):
    if path.parent.name in ("test", "idlelib", "lib2to3", "turtledemo"):
      continue
    texts = {}
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        words = re.findall("[a-z]+", (ast.get_docstring(node) or "").lower())
        if len(words) >= 6:
          texts[" ".join(words)] = words
    if len(texts) >= 8:
      found.append([*texts.values()])
  often = collections.Counter(w for m in found for t in m for w in t)
  number = {w: i + 3 for i, (w, _) in enumerate(often.most_common(WORDS - 3))}
  return [[[number.get(w, 2) for w in t] for t in m] for m in found]


def document(texts, rng, blocks: int) -> np.ndarray:
  """Blocks of words `[blocks, BLOCK]`, zeros behind them; whole docstrings."""
  words = [w for i in rng.permutation(len(texts)) for w in texts[i]]
  out = np.zeros(BLOCKS * BLOCK, np.int32)
  out[: min(len(words), blocks * BLOCK)] = words[: blocks * BLOCK]
  return out.reshape(BLOCKS, BLOCK)


def pairs(found, rng, blocks: int) -> tuple[np.ndarray, np.ndarray]:
  """Two documents of each module, `[n, BLOCKS, BLOCK]` each."""
  one, other = [], []
  for texts in found:
    order = rng.permutation(len(texts))
    halves = order[::2], order[1::2]
    for into, half in zip((one, other), halves, strict=True):
      into.append(document([texts[i] for i in half], rng, blocks))
  return np.stack(one), np.stack(other)


def masked(ids, key):
  """Ids with a seventh of the words masked, and which."""
  asked = (ids > 0) & (jax.random.uniform(key, ids.shape) < 0.15)
  return jnp.where(asked, MASK, ids), asked


def before(params, one, other, key):
  """The loss of the first stage: words and blocks, of both documents."""
  total = 0.0
  for i, ids in enumerate((one, other)):
    keys = jax.random.split(jax.random.fold_in(key, i))
    hidden, asked = masked(ids, keys[0])
    of = lambda method, *a: MODEL.apply({"params": params}, *a, method=method)
    total += of(MODEL.word_loss, hidden, ids > 0, ids, asked)
    total += of(MODEL.block_loss, ids, ids > 0, keys[1])
  return total


def fitted(params, one, other, key):
  """The loss of matching: as many pairs that match as others."""
  del key
  vector = lambda ids: MODEL.apply({"params": params}, ids, ids > 0)
  a, b = vector(one), vector(other)
  pairs = jnp.concatenate([a, a]), jnp.concatenate([b, jnp.roll(b, 1, axis=0)])
  return matching_loss(*pairs, jnp.arange(2 * len(a)) < len(a))


def trained(loss, params, found, seed: int, steps: int, blocks: int):
  """Parameters after so many steps on random modules."""
  rng = np.random.default_rng(seed)

  def batches():
    for i in range(steps):
      at = rng.choice(len(found), BATCH, replace=False)
      one, other = pairs([found[j] for j in at], rng, blocks)
      yield one, other, jax.random.fold_in(jax.random.key(seed), i)

  return fitting.fitted(
    loss, params, batches(), steps=steps, lr=1e-3, warmup=30, clip=1.0
  )


def scores(similar) -> tuple[float, float]:
  """Of the similarities of all documents with all others, in percent."""
  right = np.diagonal(similar)
  first = (similar.argmax(axis=1) == np.arange(len(similar))).mean()
  off = similar[~np.eye(len(similar), dtype=bool)]
  above = (right[:, None] > off[None]).mean()
  return 100 * first, 100 * above


def counted(one, other):
  """Cosines of the numbers of words, rare ones weighing more."""
  count = lambda x: np.stack(
    [np.bincount(row.reshape(-1), minlength=WORDS)[2:] for row in x]
  )
  a, b = count(one), count(other)
  rare = np.log((1 + len(a)) / (1 + (a > 0).sum(axis=0)))
  norm = lambda x: x * rare / np.linalg.norm(x * rare, axis=1, keepdims=True)
  return norm(a) @ norm(b).T


def main() -> None:
  """Trains, compares, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=400)
  args = parser.parse_args()
  found = modules()
  held = [m for i, m in enumerate(found) if i % 5 == 0]
  train = [m for i, m in enumerate(found) if i % 5]
  print(f"{len(found)} modules, {len(held)} of them held out", flush=True)
  vectors = jax.jit(lambda p, ids: MODEL.apply({"params": p}, ids, ids > 0))
  rows = collections.defaultdict(list)
  ids = jnp.zeros((1, BLOCKS, BLOCK), jnp.int32)
  every = lambda model: (
    model.word_loss(ids, ids > 0, ids, ids > 0),
    model.block_loss(ids, ids > 0, jax.random.key(0)), model(ids, ids > 0),
  )  # fmt: skip
  for seed in range(args.seeds):
    rng = np.random.default_rng(100 + seed)
    test = {n: pairs(held, rng, n) for n in (BLOCKS, 1)}
    init = jax.jit(lambda key: MODEL.init(key, method=every)["params"])
    start = init(jax.random.key(seed))
    first = trained(before, start, train, seed, args.steps, BLOCKS)
    fit = lambda params, blocks, seed=seed: trained(
      fitted, params, train, seed, args.steps, blocks
    )
    models = {
      "untrained": (start, BLOCKS),
      "pre-trained only": (first, BLOCKS),
      "first block, fine-tuned": (fit(first, 1), 1),
      "SMITH": (fit(first, BLOCKS), BLOCKS),
    }
    rows["counts of words"].append(scores(counted(*test[BLOCKS])))
    for name, (params, blocks) in models.items():
      one, other = (np.asarray(vectors(params, x)) for x in test[blocks])
      rows[name].append(scores(one @ other.T))
      print(seed, name, *rows[name][-1], flush=True)
  for name, values in rows.items():
    x = np.array(values)
    both = zip(*intervals.of_seeds(x), strict=True)
    cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in both]
    print(name, *cells, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
