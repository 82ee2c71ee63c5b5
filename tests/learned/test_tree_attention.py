"""Tree Cross Attention next to a recursion, alone and in batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.learned import reference_tree
from tokjax.learned import tree_attention
from tokjax.learned.tree_attention import TreeCrossAttention

WIDTH = 8
# Of one token, of one group, of a full tree and of trees with empty groups.
LENGTHS = (1, 2, 8, 10, 13)


@functools.cache
def inputs(branch=2, strict=False):
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(len(LENGTHS), 13, WIDTH)).astype(np.float32)
  query = jnp.asarray(rng.normal(size=(len(LENGTHS), 3, WIDTH)), jnp.float32)
  mask = jnp.arange(13)[None] < jnp.asarray(LENGTHS)[:, None]
  tokens = jnp.where(mask[..., None], tokens, jnp.nan)
  module = TreeCrossAttention(2, 6, branch, strict=strict)
  params = jax.jit(module.init)(
    jax.random.key(0), query, tokens, mask
  )["params"]
  # Policies that are sure of nothing in particular would hide a wrong child.
  params = jax.tree.map(
    lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 2, params
  )
  return module, params, query, tokens, mask


@pytest.mark.parametrize(("branch", "strict"), [(2, False), (3, True)])
def test_a_ragged_batch_is_read_as_each_query_by_recursion(branch, strict):
  module, params, query, tokens, mask = inputs(branch, strict)
  got = jax.jit(module.apply)({"params": params}, query, tokens, mask)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for b, n in enumerate(LENGTHS):
    for q in range(3):
      want = reference_tree.read(
        exact, np.asarray(query[b, q], float), np.asarray(tokens[b, :n], float),
        branch, strict,
      )  # fmt: skip
      for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x[b, q], y, rtol=2e-4, atol=2e-4)
  if branch == 2:
    # Of 8 two levels and two leaves.
    assert got.read[2].tolist() == [4] * 3
    assert (got.read <= 5).all()


def test_levels_are_counted_in_integers():
  assert tree_attention.shape(1024, 2) == (9, 2)
  assert tree_attention.shape(1025, 2) == (10, 2)
  assert tree_attention.shape(5, 4) == (1, 2)
  assert tree_attention.shape(1, 2) == (0, 1)


def test_the_policy_is_drawn_with_a_key_and_learns():
  module, params, query, tokens, mask = inputs()
  query = jnp.repeat(query[2:3, :1], 400, axis=1)
  tokens, mask = tokens[2:3, :8], mask[2:3, :8]

  def found(params, key):
    return module.apply({"params": params}, query, tokens, mask, key=key)

  def loss(params, wanted):
    read = found(params, jax.random.key(1))
    reward = (read.group == wanted).astype(jnp.float32)
    return tree_attention.policy_loss(read, reward, bonus=0.0), read

  @jax.jit
  def step(params, wanted):
    slope, read = jax.grad(loss, has_aux=True)(params, wanted)
    return jax.tree.map(lambda x, s: x - 0.1 * s, params, slope), read

  read = step(params, 0)[1]
  groups, counts = np.unique(read.group[0], return_counts=True)
  assert len(groups) > 2
  for group, count in zip(groups, counts, strict=True):
    p = np.exp(read.log_prob[0][read.group[0] == group][0])
    assert abs(count / 400 - p) < 4 * np.sqrt(p * (1 - p) / 400) + 1e-6
  wanted = int(groups[np.argsort(counts)[-2]])
  for _ in range(30):
    params, read = step(params, wanted)
  assert (read.group == wanted).mean() > 0.9 > 2 * sorted(counts)[-2] / 400


@pytest.mark.parametrize("through", [False, True])
def test_tokens_learn_through_nodes_only_where_asked(through):
  module, params, query, tokens, mask = inputs()
  module = module.clone(through=through)
  query, tokens, mask = query[2:3, :1], tokens[2:3, :8], mask[2:3, :8]

  def total(params, tokens):
    read = module.apply({"params": params}, query, tokens, mask)
    return (read.out**2).sum() + read.log_prob.sum(), read.group

  of = jax.jit(jax.grad(total, (0, 1), has_aux=True))
  (slope, at), group = of(params, tokens)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
  assert np.abs(slope["node"]["mlp"]["fc2"]["kernel"]).max() > 0
  own = np.arange(8) // 2 == int(group[0, 0])
  assert (np.abs(at[0]).max(axis=-1) > 0).tolist() == (own | through).tolist()


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="branch=1: must be 2 or more"):
    TreeCrossAttention(branch=1)
  ask = lambda heads, width: jax.eval_shape(
    TreeCrossAttention(heads).init, jax.random.key(0), jnp.ones((1, 1, width)),
    jnp.ones((1, 4, 8)), jnp.ones((1, 4), bool),
  )  # fmt: skip
  with pytest.raises(ValueError, match="heads=3: must divide the width 8"):
    ask(3, 8)
  with pytest.raises(ValueError, match="query of width 4: must be .* 8"):
    ask(2, 4)
