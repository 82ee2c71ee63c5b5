"""SMITH on the standard library: which documents are of one module?

    python -m scripts.learned_documents [--seeds 3] [--steps 400]

A document is made of docstrings of one module, up to 6 blocks of 12 words. Two
documents match if they are of one module, of whose docstrings neither shares
one with the other. The encoder (one layer of words, one of blocks) is trained
on four fifths of the modules, by masked words and blocks, then by matching; so
are, by matching alone, means of embeddings of words, which have as many numbers
a document. Of each of the other modules one document is looked for among all
with the other one. Prints how often it is the most similar one, and how often a
pair that matches is more similar than one that does not, and how many vectors
are all zeros, in percent over seeds with 95 % intervals. "softmax" is trained
from scratch by another loss, that of telling the other document from all of the
batch.
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
import optax

from experiments.sweeps import intervals
from scripts import fitting
from tokjax.models.hierarchical_encoder import (
  HierarchicalConfig,
  HierarchicalEncoder,
  matching_loss,
  unit,
)

WORDS, BLOCK, BLOCKS, BATCH = 1024, 12, 6, 32
MASK, SHARP = 1, 20.0
CONFIG = HierarchicalConfig(
  vocabulary=WORDS, width=64, heads=4, mlp_dim=128, block=BLOCK, blocks=BLOCKS,
  depth=1, depth_above=1,
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


def document(texts, rng) -> np.ndarray:
  """Blocks of words `[blocks, BLOCK]`, zeros behind them; whole docstrings."""
  words = [w for i in rng.permutation(len(texts)) for w in texts[i]]
  out = np.zeros(BLOCKS * BLOCK, np.int32)
  out[: len(words)] = words[: len(out)]
  return out.reshape(BLOCKS, BLOCK)


def pairs(found, rng) -> tuple[np.ndarray, np.ndarray]:
  """Two documents of each module, `[n, BLOCKS, BLOCK]` each."""
  one, other = [], []
  for texts in found:
    order = rng.permutation(len(texts))
    halves = order[::2], order[1::2]
    for into, half in zip((one, other), halves, strict=True):
      into.append(document([texts[i] for i in half], rng))
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


def vector(params, ids):
  """Of documents, by the encoder."""
  return MODEL.apply({"params": params}, ids, ids > 0)


def pooled(params, ids):
  """Unit vectors of documents: means of embeddings of words."""
  real = (ids > 0)[..., None]
  return unit(jnp.where(real, params["words"][ids], 0.0).sum(axis=(1, 2)))


def matching(vector):
  """The loss of matching: each document with all of the batch."""

  def loss(params, one, other, key):
    del key
    a, b = vector(params, one), vector(params, other)
    n = len(a)
    match = jnp.eye(n, dtype=bool).reshape(-1)
    of = jnp.repeat(a, n, axis=0), jnp.tile(b, (n, 1))
    # As many wrong pairs for each right one: these weigh more, as published.
    return matching_loss(*of, match, positive=n - 1.0)

  return loss


def contrast(params, one, other, key):
  """Another loss: which document of the batch is the other one, a softmax."""
  del key
  z = SHARP * vector(params, one) @ vector(params, other).T
  of = jnp.arange(len(z))
  return optax.softmax_cross_entropy_with_integer_labels(z, of).mean()


def trained(loss, params, found, seed: int, steps: int, lr: float):
  """Parameters after so many steps on random modules."""
  rng = np.random.default_rng(seed)

  def batches():
    for i in range(steps):
      at = rng.choice(len(found), BATCH, replace=False)
      one, other = pairs([found[j] for j in at], rng)
      yield one, other, jax.random.fold_in(jax.random.key(seed), i)

  return fitting.fitted(
    loss, params, batches(), steps=steps, lr=lr, warmup=steps // 5, clip=1.0
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
  parser.add_argument("--lr", type=float, default=3e-4)
  args = parser.parse_args()
  found = modules()
  held = [m for i, m in enumerate(found) if i % 5 == 0]
  train = [m for i, m in enumerate(found) if i % 5]
  print(f"{len(found)} modules, {len(held)} of them held out", flush=True)
  run = {f: jax.jit(f) for f in (vector, pooled)}
  rows = collections.defaultdict(list)
  ids = jnp.zeros((1, BLOCKS, BLOCK), jnp.int32)
  every = lambda model: (
    model.word_loss(ids, ids > 0, ids, ids > 0),
    model.block_loss(ids, ids > 0, jax.random.key(0)), model(ids, ids > 0),
  )  # fmt: skip
  init = jax.jit(lambda key: MODEL.init(key, method=every)["params"])
  for seed in range(args.seeds):
    test = pairs(held, np.random.default_rng(100 + seed))
    of = (train, seed, args.steps)
    start = init(jax.random.key(seed))
    first = trained(before, start, *of, lr=1e-3)
    draw = jax.random.normal(jax.random.key(seed), (WORDS, CONFIG.width))
    words = {"words": draw * CONFIG.width**-0.5}
    fit = lambda of_what, x, lr, of=of: trained(
      matching(of_what), x, *of, lr=lr
    )
    models = {
      "means of words, untrained": (pooled, words),
      "means of words": (pooled, fit(pooled, words, 1e-2)),
      "SMITH, untrained": (vector, start),
      "SMITH, pre-trained only": (vector, first),
      "SMITH, not pre-trained": (vector, fit(vector, start, args.lr)),
      "SMITH": (vector, fit(vector, first, args.lr)),
      "SMITH, softmax": (vector, trained(contrast, start, *of, lr=2e-3)),
    }
    rows["counts of words"].append((*scores(counted(*test)), 0.0))
    for name, (of_what, params) in models.items():
      one, other = (np.asarray(run[of_what](params, x)) for x in test)
      lost = 100 * (~one.any(axis=1)).mean()
      rows[name].append((*scores(one @ other.T), lost))
      print(seed, name, *rows[name][-1], flush=True)
  for name, values in rows.items():
    x = np.array(values)
    both = zip(*intervals.of_seeds(x), strict=True)
    cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in both]
    print(name, *cells, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
