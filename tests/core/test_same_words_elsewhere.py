"""Scorers, selectors and plans serve key blocks and KV caches unchanged.

Sketches of the `attend` and `cache` slots, kept as tests so that the types
cannot drift away from them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import matching, scores, selection
from tokjax.plan import Assignment


def test_a_cache_is_evicted_per_head_by_one_plan():
  """SnapKV in five lines: what the last queries attend to stays, per head."""
  heads, n, window, budget, width = 3, 20, 4, 9, 8
  k, v = jax.random.normal(jax.random.key(0), (2, heads, n, width))
  q = jax.random.normal(jax.random.key(1), (heads, window, width))

  def evict(q, k, v):
    mass = jax.nn.softmax(q @ k.T, axis=-1).sum(0)
    recent = jnp.arange(n) >= n - window
    pick = selection.top_k(jnp.where(recent, jnp.inf, mass), budget)
    plan = Assignment.select(selection.in_order(pick).index, n)
    return plan, plan.apply(k), plan.apply(v)

  plan, small_k, small_v = jax.jit(jax.vmap(evict))(q, k, v)
  assert small_k.shape == small_v.shape == (heads, budget, width)
  for h in range(heads):
    mass = jax.nn.softmax(q[h] @ k[h].T, axis=-1).sum(0)[: n - window]
    best = set(np.argsort(-np.asarray(mass))[: budget - window].tolist())
    kept = plan.anchor[h].tolist()
    assert set(kept) == best | set(range(n - window, n))
    np.testing.assert_array_equal(small_k[h], k[h][plan.anchor[h]])


def test_a_cache_is_merged_by_the_matcher_that_merges_patches():
  """Keys and values move through one plan and mass is conserved."""
  n, remove = 16, 5
  k, v = jax.random.normal(jax.random.key(2), (2, n, 8))
  sides = matching.parity(n)
  unit = scores.normalise(k)
  similarity = unit[sides.source] @ unit[sides.target].T
  plan = matching.bipartite(similarity, sides, n, remove)
  plan = plan.weighted(jnp.ones(n))
  assert plan.apply(k).shape == plan.apply(v).shape == (n - remove, 8)
  size = plan.total(jnp.ones(n))
  assert float(size.sum()) == n
  np.testing.assert_allclose(
    (plan.apply(v) * size[:, None]).sum(0), v.sum(0), rtol=1e-5, atol=1e-5
  )


def test_key_blocks_are_selected_by_the_selector_of_tokens():
  """Per head and query block: mean-pooled scores, causal, top-k with a mask."""
  heads, n, block, k_blocks = 2, 64, 8, 3
  blocks = n // block
  q, k = jax.random.normal(jax.random.key(3), (2, heads, n, 16))

  def pooled(x):
    return x.reshape(blocks, block, -1).mean(1)

  def choose(q, k):
    score = pooled(q) @ pooled(k).T
    causal = jnp.tril(jnp.ones((blocks, blocks), bool))
    pick = lambda s, m: selection.top_k(s, k_blocks, mask=m)
    return jax.vmap(pick)(score, causal)

  index, valid = jax.jit(jax.vmap(choose))(q, k)
  assert index.shape == valid.shape == (heads, blocks, k_blocks)
  for h in range(heads):
    for i in range(blocks):
      seen = set(np.asarray(index[h, i])[np.asarray(valid[h, i])].tolist())
      assert len(seen) == min(i + 1, k_blocks)
      assert max(seen) <= i
