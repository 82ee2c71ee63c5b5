"""Retrieval by tokens on docstrings: recall and time, XTR next to exact search.

    python -m scripts.bench_retrieval [--seeds 3] [--steps 300] [--k 100]

The corpus is the standard library: a document is a docstring without its first
eight words, which are the query that has to find it. A small encoder of words
is trained on four fifths of them, once with all tokens of a batch (exact late
interaction) and once with the `--train-k` that each token retrieves (XTR). 200
others are looked for among all documents. Prints one tab-separated row for each
encoder and search: recall at 1 and at 10 over seeds, with a 95 % interval, and
milliseconds a query.
"""

import argparse
import ast
import collections
import pathlib
import re
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.sweeps import intervals
from tokjax import late_interaction as late

QUERY, DOCUMENT, WORDS, WIDTH, OUT, BATCH = 8, 40, 4096, 64, 32, 32
SCALE = 20.0


def corpus() -> tuple[np.ndarray, np.ndarray]:
  """Ids of queries `[n, QUERY]` and documents `[n, DOCUMENT]`; 0 is padding."""
  texts = []
  for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        words = re.findall("[a-z]+", (ast.get_docstring(node) or "").lower())
        if len(words) >= 2 * QUERY and words not in texts:
          texts.append(words)
  often = collections.Counter(w for text in texts for w in text)
  number = {w: i + 2 for i, (w, _) in enumerate(often.most_common(WORDS - 2))}

  def rows(part, length):
    out = np.zeros((len(texts), length), np.int32)
    for row, text in zip(out, texts, strict=True):
      ids = [number.get(w, 1) for w in text[part][:length]]
      row[: len(ids)] = ids
    return out

  return rows(slice(QUERY), QUERY), rows(slice(QUERY, None), DOCUMENT)


def initial(key):
  """Of the encoder."""
  keys = jax.random.split(key, 2)
  return {
    "words": jax.random.normal(keys[0], (WORDS, WIDTH)),
    "out": jax.random.normal(keys[1], (3 * WIDTH, OUT)) * (3 * WIDTH) ** -0.5,
  }


def encoded(params, ids):
  """Unit vectors of words with their neighbours, `[b, n, OUT]`."""
  x = params["words"][ids] * (ids > 0)[..., None]
  pad = jnp.pad(x, [(0, 0), (1, 1), (0, 0)])
  x = jnp.concatenate([pad[:, :-2], x, pad[:, 2:]], axis=-1) @ params["out"]
  return x * jax.lax.rsqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


def trained(queries, documents, seed: int, steps: int, k: int):
  """Parameters after training on these pairs."""
  optimiser = optax.adam(3e-3)

  def loss(params, q, d):
    scores = late.trained_scores(
      encoded(params, q), q > 0, encoded(params, d), d > 0, k
    )
    return late.retrieval_loss(scores, SCALE)

  @jax.jit
  def run(params, order):
    def step(carry, rows):
      params, state = carry
      slope = jax.grad(loss)(params, queries[rows], documents[rows])
      update, state = optimiser.update(slope, state)
      return (optax.apply_updates(params, update), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), order)[0][0]

  rng = np.random.default_rng(seed)
  order = [rng.choice(len(queries), BATCH, replace=False) for _ in range(steps)]
  order = np.array(order, np.int32).reshape(steps, BATCH)
  return run(initial(jax.random.key(seed)), order)


def searches(documents, ks):
  """Functions from parameters, tokens and a query to documents in order."""
  flat = documents.reshape(-1)
  real = np.flatnonzero(flat > 0)
  owner = jnp.asarray(real // documents.shape[1])

  def exact(tokens, q, mask):
    scores = late.exact_scores(q, mask, tokens, owner, len(documents))
    return jax.lax.top_k(scores, 10)[1]

  def few(k):
    def search(tokens, q, mask):
      return late.search(q, mask, tokens, owner, k).document[:10]

    return search

  named = {"exact": exact, **{f"XTR, {k} tokens": few(k) for k in ks}}
  return real, {name: jax.jit(fn) for name, fn in named.items()}


def measured(params, queries, documents, wanted, ks):
  """Recall at 1 and 10 and milliseconds a query of every search."""
  real, found = searches(documents, ks)
  tokens = encoded(params, documents).reshape(-1, OUT)[real]
  vectors, mask = encoded(params, queries), queries > 0
  rows = {}
  for name, search in found.items():
    search(tokens, vectors[0], mask[0])
    began = time.perf_counter()
    best = [search(tokens, q, m) for q, m in zip(vectors, mask, strict=True)]
    best = np.asarray(jax.block_until_ready(jnp.stack(best)))
    spent = 1e3 * (time.perf_counter() - began) / len(queries)
    hit = best == wanted[:, None]
    rows[name] = (hit[:, 0].mean(), hit.any(axis=1).mean(), spent)
  return rows


def main() -> None:
  """Trains, searches, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--k", type=int, nargs="+", default=[10, 100, 1000])
  parser.add_argument("--train-k", type=int, default=64)
  args = parser.parse_args()
  queries, documents = corpus()
  kinds = {"untrained": 0, "exact": BATCH * DOCUMENT, "XTR": args.train_k}
  found = collections.defaultdict(list)
  for seed in range(args.seeds):
    order = np.random.default_rng(seed).permutation(len(queries))
    held, rest = np.split(order, [len(order) // 5])
    held = held[:200]
    q, d = jnp.asarray(queries[rest]), jnp.asarray(documents[rest])
    for kind, k in kinds.items():
      params = trained(q, d, seed, args.steps if k else 0, max(k, 1))
      given = (jnp.asarray(queries[held]), documents, held, args.k)
      for name, row in measured(params, *given).items():
        found[kind, name].append(row)
  print(f"{len(documents)} documents, {(documents > 0).sum()} tokens")
  print("trained with\tsearch\trecall at 1\tat 10\tms a query")
  for (kind, name), rows in found.items():
    x = np.array(rows)
    mean, half = intervals.of_seeds(100 * x[:, :2])
    cells = [f"{a:.1f} ± {b:.1f}" for a, b in zip(mean, half, strict=True)]
    print(kind, name, *cells, f"{x[:, 2].min():.2f}", sep="\t")


if __name__ == "__main__":
  main()
