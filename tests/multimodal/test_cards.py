"""What the papers' descriptions of pruned visual tokens say in numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of
from tests.multimodal import prompts, reference
from tests.multimodal.prompts import DEPTH, KINDS, LENGTH, MORE, PROMPTS, T, V
from tokjax import budgets, matching, recipes
from tokjax.models import decoder_slots
from tokjax.recipes.multimodal.pruning import SPARSEVLM, SPARSEVLM_PLUS, raters
from tokjax.reduce.site import Site
from tokjax.signals import Answers, Rows
from tokjax.tokens import Tokens

RECIPES = tuple(prompts.OPTIONS)
# What the official functions kept of the prompts "long" and "short", from the
# states of slow decoders with ungrouped heads (2026-11-28).
OFFICIAL = {
  "fastv": (
    reference.FastV(2, 0.5),
    [[2, 3, 4, 5, 8, 9, 10, 11, 12, 13]],
    [[2, 5, 6, 8, 10, 11]],
  ),
  "pyramiddrop": (
    reference.PyramidDrop((1, 2, 3), (0.5, 0.25, 0.125)),
    [[2, 3, 4, 5, 8, 9, 10, 11, 12, 13], [4, 5, 9, 12, 13], [4, 13]],
    [[2, 5, 6, 8, 11], [2, 8], [8]],
  ),
  "sparsevlm": (
    reference.SparseVLM((1, 2), (12, 6)),
    # The last of each image are clusters, by their centres.
    [
      [3, 4, 5, 7, 9, 10, 11, 12, 13, 19, 20, 21, 8],
      [4, 7, 9, 10, 11, 13, 21],
    ],
    [[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1], [2, 4, 5, 6, 7, 1, 11]],
  ),
  # Its number of heads, 14, set to 2 of 4 (2026-11-30).
  "sparsevlm_plus": (
    reference.SparseVLMPlus((1, 2), (12, 6), heads=2),
    [[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16], [2, 3, 4, 8, 9, 10]],
    [[1, 2, 3, 4, 5, 7, 8, 9, 10, 11], [1, 2, 3, 4, 8, 9]],
  ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_slow_decoders_keep_what_the_official_code_kept(recipe):
  method, *official = OFFICIAL[recipe]
  cfg = config(depth=DEPTH, kv_heads=4)
  for name, kept in zip(("long", "short"), official, strict=True):
    slow = reference.Slow(cfg, params_of(cfg))
    assert slow.run(PROMPTS[name], KINDS[name], method).kept == kept


@pytest.mark.parametrize("recipe", RECIPES)
def test_keeping_everything_leaves_the_plain_model(recipe):
  slots = recipes.get(recipe, keep=1.0)
  cfg = decoder(slots, depth=DEPTH).config
  stages = decoder_slots.stages_of(slots, cfg, LENGTH, ((T, 12), (V, 20)))
  assert not any(stages)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_smaller_fraction_is_reached_at_the_end(recipe):
  slots = recipes.get(recipe, keep=0.1)
  (reduce,) = slots.reduce
  counts = [n for n in reduce.budget.counts(576, 32) if n is not None]
  assert counts == sorted(counts, reverse=True)
  assert abs(counts[-1] - 57.6) <= 2


def test_fastv_rounds_half_to_even_and_keeps_what_the_last_token_sees():
  (reduce,) = recipes.get("fastv").reduce
  assert [reduce.budget.count(n, 2, 32) for n in (1, 3, 5, 576)] == [
    None, 2, 2, 288,
  ]  # fmt: skip
  (question,) = reduce.asks
  answers = Answers().add(
    question.answered(1), jnp.asarray([0.1, 0.4, 0.2, 0.3])
  )
  site = Site(Tokens.create(jnp.zeros((4, 2))), answers, 2, layer=2, depth=4)
  np.testing.assert_array_equal(reduce.rule(site).anchor, [1, 3])


def test_hiding_from_block_k_on_gives_the_texts_of_removing():
  cfg, more = config(depth=DEPTH), MORE[:2, 0]
  removed, hidden = (
    reference.Slow(cfg, params_of(cfg)).run(
      PROMPTS["long"], KINDS["long"], method(2, 0.5), more
    )
    for method in (reference.FastV, reference.MaskedFastV)
  )
  np.testing.assert_allclose(removed.logits, hidden.logits, atol=1e-12)
  assert hidden.lengths[-1] > removed.lengths[-1]


def test_pyramiddrop_leaves_a_half_a_quarter_an_eighth():
  (reduce,) = recipes.get("pyramiddrop").reduce
  counts = reduce.budget.counts(576, 32)
  assert {i: n for i, n in enumerate(counts) if n} == {8: 288, 16: 144, 24: 72}
  left = np.array([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8)
  assert left.mean() == 270 == 0.46875 * 576
  # Fractions of the depth are one meaning for every model.
  assert budgets.Stages({8: 0.5, 16: 0.25, 24: 0.125}).counts(576, 32) == counts


@pytest.mark.parametrize(
  ("average", "counts", "mean"),
  [
    (192, [309, 204, 113], 192.0),
    (128, [312, 117, 39], 128.6),
    (64, [82, 32, 18], 64.8),
  ],
)
def test_sparsevlm_counts(average, counts, mean):
  found = SPARSEVLM[average].counts(576, 32)
  assert {i: n for i, n in enumerate(found) if n is not None} == dict(
    zip((2, 6, 15), counts, strict=True)
  )
  blocks = np.array([2, 4, 9, 17]) @ [576, *counts]
  np.testing.assert_allclose(blocks / 32, mean, atol=0.05)


def test_sparsevlm_plus_counts_and_rates_by_the_best_heads_alone():
  found = SPARSEVLM_PLUS[64].counts(576, 32)
  assert {i: n for i, n in enumerate(found) if n} == {2: 66, 6: 34, 15: 20}
  few = budgets.Recycled({0: 300}, pooled=0.0)
  assert [few.count(n, 0, 1) for n in (0, 1, 2, 300, 301)] == [
    0, 1, 1, 299, 300,
  ]  # fmt: skip
  (reduce,) = recipes.get("sparsevlm_plus", heads=1).reduce
  (question,) = (q for q in reduce.rule.asks if isinstance(q, Rows))
  rows = jnp.asarray([[0.1, 0.1, 0.9], [0.4, 0.5, 0.3], [0.0, -9.0, 9.0]])
  tokens = Tokens.create(jnp.zeros((3, 2)), mask=jnp.asarray([1, 1, 0], bool))
  site = Site(tokens, Answers((question.answered(0),), (rows,)), 2)
  # Head 1 gives the two real tokens the most.
  np.testing.assert_allclose(
    reduce.rule.score(site), [0.4, 0.5, 0.0], rtol=1e-6
  )
  with pytest.raises(ValueError, match="heads=0"):
    recipes.get("sparsevlm_plus", heads=0)
  with pytest.raises(ValueError, match="by_rotation"):
    Rows(form="by_rotation")


def test_where_few_arrive_one_is_recycled_and_none_is_lost():
  budget = budgets.Recycled({0: 300})
  assert [budget.count(n, 0, 1) for n in (0, 1, 2, 300, 301)] == [
    0, 1, 2, 300, 301,
  ]  # fmt: skip
  assert budget.best(300, 0, 1) == 299
  assert budget.count(576, 0, 2) == 309 and budget.count(576, 1, 2) is None
  for bad in ({0: -1}, {0: 0.0}, {0: 1.5}):
    with pytest.raises(budgets.BudgetError, match=r"kept\[0\]"):
      budgets.Recycled(bad)


def test_raters_are_texts_behind_the_image_above_the_mean():
  kind = jnp.asarray([T, V, V, T, T, T, T], jnp.int32)
  x = jnp.asarray(
    [[9, 9], [1, 0], [0, 1], [2, 2], [0, 0], [3, 0], [9, 9]], jnp.float32
  )
  mask = jnp.arange(7) < 6
  tokens = Tokens.create(x, kind=kind, mask=mask)
  v, t = np.asarray(x[1:3]), np.asarray(x[3:6])
  share = np.exp(v @ t.T)
  share = (share / share.sum(axis=1, keepdims=True)).mean(axis=0)
  expected = np.zeros(7)
  expected[3:6] = share > share.mean()
  assert 0 < expected.sum() < 3
  np.testing.assert_array_equal(raters(tokens), expected)
  # A single token gets all, which is no more than the mean: it rates.
  alone = tokens.replace(mask=jnp.arange(7) < 4)
  np.testing.assert_array_equal(raters(alone), [0, 0, 0, 1, 0, 0, 0])
  # No image, or no text behind it: there are no raters.
  image = tokens.replace(mask=jnp.arange(7) < 3)
  assert not raters(image).any()


def test_recycling_needs_its_budget():
  (reduce,) = recipes.get("sparsevlm").reduce
  site = Site(Tokens.create(jnp.zeros((4, 2))), Answers(), 2)
  with pytest.raises(ValueError, match="budget=None.*Recycled"):
    reduce.rule(site)


def test_as_many_neighbours_as_clusters_also_where_padded():
  x = jnp.asarray(np.random.default_rng(3).normal(size=(12, 4)), jnp.float32)

  @jax.jit
  def plans(x):
    many = matching.dpc_knn(
      x, 5, neighbours=None, mask=jnp.arange(12) < 9, count=jnp.int32(3)
    )
    few = (matching.dpc_knn(x[:9], 3, neighbours=k) for k in (None, 3))
    return many, *few

  padded, alone, fixed = plans(x)
  np.testing.assert_array_equal(alone.index, fixed.index)
  np.testing.assert_array_equal(padded.index[:9], alone.index)
  np.testing.assert_array_equal(padded.anchor[:3], alone.anchor)
