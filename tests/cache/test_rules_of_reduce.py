"""Rules of `reduce` evict cache entries: by questions, by merging, by steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache import cases
from tests.cache.cases import LENGTHS, Case
from tokjax import budgets, recipes
from tokjax.binding import bind
from tokjax.cache.evict import evicting
from tokjax.cache.kv import KV
from tokjax.cache.trim import Trim
from tokjax.recipes.vision.merging import tome_rule
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop, keep_top, key_norm
from tokjax.signals import Keys, Last, Queries, Rows, Values
from tokjax.slots import Slots

HALF = budgets.Share(0.5)


def case_of(cache, name="of a rule"):
  return Case(name, Slots(cache=cache), depth=1)


def test_snapkv_is_the_top_of_a_question():
  """Rows of the last queries, pooled: the same entries, and so outputs."""
  options = cases.options_of("snapkv")
  snap = Case("snapkv", recipes.get("snapkv", keep=0.5, **options), depth=1)
  window, kernel = options["window"], options["kernel"]
  rule = keep_top(Rows(of=Last(window)), pool=kernel)
  got = case_of(KV(evicting(rule, HALF, last=window)))
  np.testing.assert_array_equal(got.decoded, snap.decoded)


def test_entries_are_merged_by_the_rule_that_merges_patches():
  """ToMe on keys: half of the entries, and none of their mass is lost."""
  rule = bind(tome_rule, sides="alternating")
  got = case_of(KV(evicting(rule, budgets.Share(0.75))))
  _, _, start, _, _ = got.result
  store = start[0].store
  there = np.asarray(store.valid)
  count = np.where(there, np.asarray(store.extra["count"]), 0)
  for b, n in enumerate(LENGTHS):
    assert there[b].sum(axis=-1).tolist() == [n * 3 // 4] * cases.GROUPS
    np.testing.assert_allclose(count[b].sum(axis=-1), n)
  assert np.isfinite(got.decoded).all()


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("merge", [False, True])
def test_any_score_trims_at_every_step_or_every_so_many(slack, merge):
  rule = KeepTop(key_norm)
  evict = evicting(rule, HALF, last=2, merge=merge)
  got = case_of(KV(evict, trim=Trim(rule, slack=slack, merge=merge)))
  _, _, _, end, _ = got.result
  length = np.asarray(end[0].store.length)
  for b, n in enumerate(LENGTHS):
    most = n // 2 + slack + merge
    assert (length[b] <= most).all()
    assert (length[b] >= n // 2).all()
  assert np.isfinite(got.decoded).all()


def longest(site):
  return jnp.linalg.norm(site[Values()], axis=-1).mean(axis=0)


longest.asks = (Values(),)


def test_a_step_scores_the_entries_that_are_there():
  """After every step those with the longest values are there."""
  rule = KeepTop(longest)
  got = case_of(KV(evicting(rule, HALF), trim=Trim(rule)))
  _, _, _, end, _ = got.result
  store = end[0].store
  for b, n in enumerate(LENGTHS):
    v = cases.TEXT.v[0, b, : n + cases.STEPS]
    norm = np.linalg.norm(v, axis=-1)  # [n, G]
    for g in range(cases.GROUPS):
      kept = set(np.asarray(store.position[b, g])[: n // 2].tolist())
      # What went before is not there any more, so go step by step.
      alive = set(np.argsort(-norm[:n, g], kind="stable")[: n // 2].tolist())
      for step in range(n, n + cases.STEPS):
        alive.add(step)
        alive.remove(min(alive, key=lambda i, g=g: norm[i, g]))
      assert kept == alive


def asks_queries(site):
  return site[Queries()].mean(axis=(0, 2))


asks_queries.asks = (Queries(),)


@pytest.mark.parametrize(
  ("cache", "message"),
  [
    (
      KV(evicting(keep_top(Rows(of=Last(), layer=-1)), HALF)),
      "its own layer only",
    ),
    (
      KV(evicting(KeepTop(key_norm), HALF), trim=Trim(KeepTop(asks_queries))),
      "not answered between steps",
    ),
    (KV(Reduce(KeepTop(key_norm), HALF, at="mlp")), "not for caches"),
    (
      KV(Reduce(KeepTop(key_norm), HALF, unmerged=True)),
      "unmerged are not for caches",
    ),
  ],
)
def test_what_a_cache_cannot_answer_is_refused(cache, message):
  layer = cases.layers()[0]
  c = case_of(cache)
  with pytest.raises(ValueError, match=message):
    cache.check(layer, c.attend, cases.PROMPT, cases.STEPS)


def test_keys_of_a_prompt_are_those_before_rotation():
  seen = []

  def look(site):
    seen.append(site[Keys()].shape)
    return site[Keys()].mean(axis=(0, 2))

  look.asks = (Keys(),)
  cache = KV(evicting(KeepTop(look), HALF))
  layer = cases.layers()[0]
  jax.eval_shape(
    lambda: jax.tree.leaves(
      cache.compress(layer, cache.init(layer, 2, 8, 1), {}, {})
    )
  )
  assert set(seen) == {(1, 8, cases.WIDTH)}
