"""Times block-sparse attention on the CPU, as ratios within one process.

    python scripts/bench_block_sparse_cpu.py [--rounds 5] [--length 4096]

Each round runs every candidate once, in turn, so that a loaded machine hits
all alike; the best round counts. Dense attention is written with einsums in
both axis orders, and the faster of the two is the unit. "planned" includes
building the layout from block scores (mean-pooled queries and keys, top-k)
inside the same jit. Prints one tab-separated row per candidate: name, best
seconds, ratio to dense, ratio to `jax.nn.dot_product_attention`.
"""

import argparse
import functools
import time

import jax
from jax import numpy as jnp

from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts


def dense(q, k, v, order="bhsd"):
  """Einsum, softmax, einsum; on `[b, s, h, d]` or transposed first."""
  if order == "bshd":
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v)
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  scores = jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
  out = jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(scores), v)
  return jnp.swapaxes(out, 1, 2)


def planned(q, k, v, listed, block):
  """Mean-pooled block scores, top-k of them, attention."""
  pool = lambda x: jnp.mean(
    x.reshape(x.shape[0], -1, block, *x.shape[2:]), axis=2
  )
  scores = jnp.einsum("bihd,bjhd->bhij", pool(q), pool(k))
  layout = layouts.from_scores(
    scores,
    layouts.TopK(listed),
    q_len=q.shape[1],
    k_len=k.shape[1],
    block_q=block,
    block_k=block,
  )
  return block_sparse_attention(q, k, v, layout, implementation="xla")


def gradient(fn):
  """Forward and backward of `fn`, for q, k and v."""
  return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(fn(q, k, v))), (0, 1, 2))


def candidates(length, block, shares):
  """Functions of q, k, v by name."""
  whole = layouts.full(q_len=length, block_q=block, block_k=block)
  forms = {
    "dense": dense,
    "dense_bshd": functools.partial(dense, order="bshd"),
    "stock": jax.nn.dot_product_attention,
    "xla_all_blocks": lambda q, k, v: block_sparse_attention(
      q, k, v, whole, implementation="xla"
    ),
    "xla_causal": lambda q, k, v: block_sparse_attention(
      q,
      k,
      v,
      layouts.from_pattern(
        layouts.Causal(), q_len=length, block_q=block, block_k=block
      ),
      implementation="xla",
    ),
  }
  for share in shares:
    listed = max(1, round(share * length / block))
    name = f"xla_planned_{listed}_of_{length // block}"
    forms[name] = functools.partial(planned, listed=listed, block=block)
  return forms


def main():
  """Parses the flags, runs the rounds, prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--head_size", type=int, default=128)
  parser.add_argument("--block", type=int, default=128)
  parser.add_argument("--share", type=float, nargs="*", default=[0.1, 0.25])
  parser.add_argument("--backward", action="store_true")
  args = parser.parse_args()
  shape = (1, args.length, args.heads, args.head_size)
  values = [
    jax.random.normal(key, shape)
    for key in jax.random.split(jax.random.key(0), 3)
  ]
  forms = candidates(args.length, args.block, args.share)
  if args.backward:
    forms = {name: gradient(fn) for name, fn in forms.items()}
  forms = {name: jax.jit(fn) for name, fn in forms.items()}
  best = dict.fromkeys(forms, float("inf"))
  for turn in range(args.rounds + 1):
    for name, fn in forms.items():
      start = time.perf_counter()
      jax.block_until_ready(fn(*values))
      if turn:  # The first round compiles.
        best[name] = min(best[name], time.perf_counter() - start)
  unit = min(best["dense"], best["dense_bshd"])
  print("name", "seconds", "of_dense", "of_stock", sep="\t")
  for name, seconds in best.items():
    print(
      name,
      f"{seconds:.4f}",
      f"{seconds / unit:.3f}",
      f"{seconds / best['stock']:.3f}",
      sep="\t",
    )


if __name__ == "__main__":
  main()
