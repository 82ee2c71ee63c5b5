"""Times the three lowerings of `Assignment.apply`, as ratios in one process.

    python scripts/bench_plan.py [--rounds 15]

Shapes are those of a vision transformer: a batch of 8 or 64 examples, ToMe
merging r of n tokens (13 and half), and pruning to half. Each round runs every
lowering once, in turn, so that a loaded machine hits all alike; the best round
counts. Prints one tab-separated row a shape: microseconds by lowering, and the
ratio of the others to "gather", which is the default for being the fastest
wherever few rows move.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.plan import Assignment

LOWERINGS = ("gather", "scatter", "onehot")


def merging(n: int, r: int) -> Assignment:
  """The first 2r tokens in pairs, weighted; the others stay."""
  parent = jnp.arange(n).at[0 : 2 * r : 2].set(jnp.arange(1, 2 * r, 2))
  plan = Assignment.from_parent(parent, n - r)
  return plan.weighted(jnp.ones((n,)))


def pruning(n: int, r: int) -> Assignment:
  """Every token but r random ones."""
  kept = np.sort(np.random.default_rng(0).permutation(n)[r:])
  return Assignment.select(jnp.asarray(kept), n)


def programs(plan: Assignment, x: jax.Array):
  """A step without arguments for each lowering."""
  plans = jax.tree.map(
    lambda v: jnp.broadcast_to(v, (x.shape[0], *v.shape)), plan
  )
  out = {}
  for lowering in LOWERINGS:
    apply = jax.jit(
      jax.vmap(lambda p, v, how=lowering: p.apply(v, lowering=how))
    )
    compiled = apply.lower(plans, x).compile()
    jax.block_until_ready(compiled(plans, x))
    out[lowering] = lambda run=compiled: jax.block_until_ready(run(plans, x))
  return out


def main() -> None:
  """Parses the command line and prints the rows."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=15)
  options = parser.parse_args()
  print(
    "kind\tbatch\tn\td\tr\t"
    + "\t".join(f"{n} us" for n in LOWERINGS)
    + "\tscatter/gather\tonehot/gather"
  )
  shapes = itertools.product((8, 64), ((65, 64), (197, 384), (197, 768)))
  for batch, (n, d) in shapes:
    x = jax.random.normal(jax.random.key(0), (batch, n, d))
    for kind, r in (("merge", 13), ("merge", n // 2), ("prune", n // 2)):
      plan = merging(n, r) if kind == "merge" else pruning(n, r)
      steps = programs(plan, x)
      best = dict.fromkeys(steps, float("inf"))
      for _ in range(options.rounds):
        for name, step in steps.items():
          start = time.perf_counter()
          step()
          best[name] = min(best[name], time.perf_counter() - start)
      times = [best[name] * 1e6 for name in LOWERINGS]
      print(
        f"{kind}\t{batch}\t{n}\t{d}\t{r}\t"
        + "\t".join(f"{t:.0f}" for t in times)
        + f"\t{times[1] / times[0]:.2f}\t{times[2] / times[0]:.2f}",
        flush=True,
      )


if __name__ == "__main__":
  main()
