"""Retrieval by tokens next to plain loops, padded and alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import late_interaction as late

# The 17 tokens of five documents; document 3 has none.
OWNER = jnp.repeat(jnp.asarray([0, 1, 2, 4]), jnp.asarray([5, 1, 8, 3]))


def vectors(rng, *shape):
  x = rng.normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_hand(query, tokens, owner, k):
  """Documents and scores, as the notebook's dictionaries have them."""
  found, missing = {}, []
  for i, q in enumerate(query):
    similarity = tokens @ q
    order = np.argsort(-similarity, kind="stable")[:k]
    missing.append(similarity[order[-1]])
    for j in order:
      found.setdefault(owner[j], {}).setdefault(i, similarity[j])
  score = lambda of: np.mean([of.get(i, m) for i, m in enumerate(missing)])
  return {d: score(of) for d, of in found.items()}


def listed(found):
  """Valid ones as a dictionary, and whether they come in order."""
  score = np.asarray(found.score)[np.asarray(found.valid)]
  names = np.asarray(found.document)[np.asarray(found.valid)].tolist()
  assert (np.diff(score) <= 0).all()
  return dict(zip(names, score.tolist(), strict=True))


def test_search_is_that_of_the_notebook_padded_or_not():
  rng = np.random.default_rng(0)
  tokens = vectors(rng, 17, 6)
  queries = vectors(rng, 3, 4, 6)
  mask = np.arange(4)[None] < np.array([4, 3, 1])[:, None]
  queries = np.where(mask[..., None], queries, np.float32(9))  # Garbage.
  run = jax.jit(
    jax.vmap(late.search, (0, 0, None, None, None)), static_argnums=4
  )
  for k in (1, 5):
    found = run(queries, mask, tokens, OWNER, k)
    for b, n in enumerate((4, 3, 1)):
      got = listed(jax.tree.map(lambda x, b=b: x[b], found))
      want = by_hand(queries[b, :n], tokens, np.asarray(OWNER), k)
      assert got.keys() == want.keys()
      for d in want:
        np.testing.assert_allclose(got[d], want[d], rtol=1e-5)


def test_all_tokens_give_exact_late_interaction():
  rng = np.random.default_rng(1)
  tokens, query = (jnp.asarray(vectors(rng, n, 6)) for n in (17, 4))
  mask = jnp.asarray([True, True, False, True])
  exact = jax.jit(late.exact_scores, static_argnums=4)(
    query, mask, tokens, OWNER, 5
  )
  got = listed(
    jax.jit(late.search, static_argnums=4)(query, mask, tokens, OWNER, 17)
  )
  assert sorted(got) == [0, 1, 2, 4]
  assert exact[3] == -np.inf
  for d in got:
    np.testing.assert_allclose(got[d], exact[d], rtol=1e-5)


def test_what_is_missing_counts_as_the_last_that_was_retrieved():
  """The second document is better although it was found only once."""
  found = late.scored(
    jnp.asarray([[0.9, 0.8], [0.7, 0.5]]),
    jnp.asarray([[1, 1], [2, 1]]),
    jnp.ones((2,), bool),
  )
  got = listed(found)
  np.testing.assert_allclose([got[1], got[2]], [0.7, 0.75], rtol=1e-6)


def test_training_scores_retrieved_tokens_alone():
  rng = np.random.default_rng(2)
  q, d = vectors(rng, 2, 3, 6), vectors(rng, 3, 4, 6)
  q_mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
  d_mask = np.arange(4)[None] < np.array([4, 2, 3])[:, None]
  for k in (1, 9):
    got = jax.jit(late.trained_scores, static_argnums=4)(
      *map(jnp.asarray, (q, q_mask, np.where(d_mask[..., None], d, 9), d_mask)),
      k,
    )
    want = np.zeros((2, 3))
    for b in range(2):
      best = [[] for _ in range(3)]
      for i in np.flatnonzero(q_mask[b]):
        pairs = [(-q[b, i] @ d[m, j], m) for m, j in np.argwhere(d_mask)]
        kept = sorted(pairs)[:k]
        for m in {m for _, m in kept}:
          best[m].append(max(-x for x, of in kept if of == m))
      want[b] = [np.mean(x) if x else 0 for x in best]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_its_loss_pulls_the_right_document():
  rng = np.random.default_rng(3)
  q, d = (jnp.asarray(vectors(rng, 2, 3, 6)) for _ in range(2))
  ones = jnp.ones((2, 3), bool)

  def loss(d):
    return late.retrieval_loss(late.trained_scores(q, ones, d, ones, 4), 5.0)

  both = jax.jit(jax.value_and_grad(loss))
  before, slope = both(d)
  assert jnp.isfinite(slope).all()
  assert both(d - 0.1 * slope)[0] < before


def test_k_is_refused():
  query, mask = jnp.ones((2, 6)), jnp.ones((2,), bool)
  with pytest.raises(ValueError, match=r"k=18: must lie in 1\.\.17"):
    late.search(query, mask, jnp.ones((17, 6)), OWNER, 18)
  with pytest.raises(ValueError, match=r"k=0: must lie in 1\.\.6"):
    late.trained_scores(query[None], mask[None], jnp.ones((3, 2, 6)),
                        jnp.ones((3, 2), bool), 0)  # fmt: skip
