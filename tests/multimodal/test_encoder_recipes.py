"""Recipes before the language model, against slow versions and cards."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.contract import hosts
from tests.contract.case import draw_params
from tests.multimodal import encoder_reference as slow
from tests.multimodal import reference_selection as selection_reference
from tests.multimodal import vlm_models
from tokjax import budgets, diversity, recipes, scores
from tokjax.models import ViT, ViTConfig
from tokjax.models.encoder import Encoder
from tokjax.models.vlm import tokens_per_image
from tokjax.plan import Assignment
from tokjax.recipes.multimodal import merging, prumerge
from tokjax.recipes.multimodal.encoder import (
  CLASS_MEAN,
  dominant_and_contextual,
)
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Answers, Attention, Keys
from tokjax.slots import Slots
from tokjax.tokens import Tokens

CLOSE = dict(rtol=1e-4, atol=1e-4)
BATCH, COLUMNS = 3, 6
KEEP = budgets.Count(12)
SEVEN = budgets.EveryOther(budgets.Count(7), evenness=1.0)
# Options of a recipe, and its slow version for an encoder of 3 blocks.
CASES = {
  "visionzip": (dict(budget=KEEP), lambda s: slow.visionzip(s, 11, 2)),
  "fastervlm": (dict(budget=KEEP), lambda s: slow.by_class(s, 12)),
  "vtc_cls": (
    dict(budget=KEEP, blocks=2), lambda s: slow.by_class(s, 12, 2)
  ),
  "vispruner": (
    dict(budget=KEEP, share=0.35, step=4),
    lambda s: slow.vispruner(s, 12, 0.35, 4),
  ),
  "holov": (
    dict(budget=KEEP, chunks=5), lambda s: slow.holov(s, 12, 5, 0.09)
  ),
  # Chunks of one token and of two; some get more than they have.
  "holov_small": (
    dict(budget=budgets.Count(30), chunks=25, weight=0.5),
    lambda s: slow.holov(s, 30, 25, 0.5),
  ),
  "todre": (dict(budget=KEEP), lambda s: slow.todre(s, 12, 2, np.sum)),
  "todre_nearest": (
    dict(budget=KEEP, over="nearest"), lambda s: slow.todre(s, 12, 2, np.min)
  ),
  "scope": (
    dict(budget=KEEP, power=0.7), lambda s: slow.scope(s, 12, 0.7)
  ),
  "hiprune": (
    dict(budget=KEEP, share=0.8), lambda s: slow.hiprune(s, 12, 0.8, 1)
  ),
  "token_corr": (
    dict(budget=budgets.Count(30), similarity=0.95, others=10, share=0.4),
    lambda s: slow.token_corr(s, 30, 0.95, 10, 0.4, 1),
  ),
  # All are alike to some others: the mean alone.
  "token_corr_alike": (
    dict(budget=KEEP, similarity=-1.0),
    lambda s: slow.token_corr(s, 12, -1.0, 3, 0.5, 1),
  ),
  # None is: as many as there is room for.
  "token_corr_unlike": (
    dict(budget=KEEP, similarity=1.1),
    lambda s: slow.token_corr(s, 12, 1.1, 3, 0.5, 1),
  ),
  "fopru": (dict(budget=KEEP), lambda s: slow.fopru(s, 12, False)),
  "fopru_rows": (
    dict(budget=KEEP, rows=True), lambda s: slow.fopru(s, 12, True)
  ),
  "prumerge": (
    dict(budget=budgets.Count(30)), lambda s: slow.prumerge(s, False)
  ),
  "prumerge_plus": (
    dict(budget=budgets.Count(30)), lambda s: slow.prumerge(s, True)
  ),
}  # fmt: skip


@functools.cache
def images() -> np.ndarray:
  shape = (BATCH, 12, 12, 3)
  return np.random.default_rng(11).normal(size=shape).astype(np.float32)


def projected(x):
  """What the projector makes of features."""
  params = vlm_models.params_of(vlm_models.config())["projector"]
  for name in ("linear1", "linear2"):
    layer = jax.device_get(params[name])
    x = x @ layer["kernel"] + layer["bias"]
    if name == "linear1":
      x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  return x


@functools.cache
def seen() -> list[slow.Seen]:
  """What the encoder without a recipe says of every image."""
  cfg = vlm_models.config()
  params, asked = vlm_models.params_of(cfg), (Attention(), Keys())
  vit = ViT(cfg.vision, Slots(collect=asked))
  _, out = jax.jit(lambda p, x: vit.apply({"params": p}, x))(
    params["vision"], images()
  )
  hidden = np.asarray(out["tokens"].x)
  of = lambda q, i: np.asarray(out["signals"][i][q.answered(i)])
  maps, keys = ([of(q, i) for i in range(cfg.vision.depth)] for q in asked)
  own = jax.device_get(params["ahead"])
  mean, var = (f(hidden, axis=-1, keepdims=True) for f in (np.mean, np.var))
  y = (hidden - mean) / np.sqrt(var + cfg.vision.epsilon)
  y = y * own["norm1"]["scale"] + own["norm1"]["bias"]
  ahead = [
    y @ own["attention"][name]["kernel"] + own["attention"][name]["bias"]
    for name in ("query", "key")
  ]
  return [
    slow.Seen(
      hidden[b], [m[b] for m in maps], [k[b] for k in keys],
      (ahead[0][b], ahead[1][b]), COLUMNS,
    )
    for b in range(BATCH)
  ]  # fmt: skip


def see(slots: Slots, key=None) -> Tokens:
  """Visual tokens as the language model takes them."""
  made = vlm_models.model(slots)
  params = vlm_models.params_of(made.config)
  run = jax.jit(
    lambda p, x: made.apply({"params": p}, x, key, method="see")[0],
    compiler_options=QUICK,
  )
  return run(params, images())


@pytest.mark.parametrize("case", CASES)
def test_visual_tokens_are_those_of_a_slow_version(case):
  options, expected = CASES[case]
  name = case.removesuffix("_rows").removesuffix("_small")
  name = name.removesuffix("_nearest").removesuffix("_alike")
  name = name.removesuffix("_unlike")
  slots = recipes.get(name, **options)
  tokens = see(slots)
  count = tokens_per_image(vlm_models.config(), slots)
  assert tokens.x.shape[1] == count < 36
  for b in range(BATCH):
    x = np.asarray(tokens.x[b])
    x = x if tokens.mask is None else x[np.asarray(tokens.mask[b])]
    np.testing.assert_allclose(x, projected(expected(seen()[b])), **CLOSE)


def test_crops_have_as_many_tokens_as_are_distinct():
  counts = [
    len(slow.token_corr(own, 36, 0.95, 10, 0.4, 1)) for own in seen()
  ]
  assert len(set(counts)) > 1 and max(counts) < 30
  with pytest.raises(ValueError, match="others=0"):
    recipes.get("token_corr", others=0)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_divprune_keeps_what_a_slow_version_keeps(share):
  tokens = see(recipes.get("divprune", budget=budgets.Once(share)))
  for b in range(BATCH):
    x = projected(seen()[b].hidden[1:])
    picked = slow.divprune(x, round(36 * share))
    np.testing.assert_allclose(tokens.x[b], x[picked], **CLOSE)


@pytest.mark.parametrize("similarity", [0.1, 0.5])
def test_gprune_keeps_what_a_slow_version_keeps(similarity):
  tokens = see(recipes.get("gprune", similarity=similarity, keep=0.3))
  for b in range(BATCH):
    x = projected(seen()[b].hidden[1:])
    kept = slow.gprune(x, 10, similarity, 0.03, 5)
    np.testing.assert_allclose(tokens.x[b], x[kept], **CLOSE)


def test_pooling_averages_cells_of_the_grid():
  tokens = see(recipes.get("avgpool_visual", budget=budgets.Square(0.25)))
  for b in range(BATCH):
    cells = seen()[b].hidden[1:].reshape(3, 2, 3, 2, -1).mean(axis=(1, 3))
    x = projected(cells.reshape(9, -1))
    np.testing.assert_allclose(tokens.x[b], x, **CLOSE)


def test_random_tokens_stand_in_order_and_depend_on_the_key():
  slots = recipes.get("random_visual", keep=0.25)
  one, again, other = (
    np.asarray(see(slots, jax.random.key(i)).x) for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 0.1
  for b in range(BATCH):
    x = projected(seen()[b].hidden[1:])
    gap = np.abs(one[b][:, None] - x[None]).max(axis=-1)
    found = gap.argmin(axis=1)
    assert gap.min(axis=1).max() < 1e-4 and (np.diff(found) > 0).all()


def test_visionzip_adds_the_mean_of_members_to_a_target():
  """Its card: angles 0, 10, 80, 90, 20, 100 degrees, targets 0 and 3."""
  angle = np.radians([0, 10, 80, 90, 20, 100])
  metric = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)

  @jax.jit
  def merged(x):
    targets = merging.strided(jnp.ones((6,), bool), 2, 2)
    parent = merging.most_similar(metric, targets)
    parent = parent.at[targets.index].set(targets.index)
    plan = Assignment.from_parent(parent, 2, exact=False)
    return targets.index, merging.target_plus_mean(plan).apply(x)

  index, x = merged(jnp.arange(1.0, 7.0)[:, None])
  np.testing.assert_array_equal(index, [0, 3])
  np.testing.assert_allclose(x[:, 0], [4.5, 8.5])


@pytest.mark.parametrize(
  ("keep", "contextual"), [(191, 30), (127, 20), (63, 10)]
)
def test_visionzip_splits_as_its_published_settings(keep, contextual):
  rng = np.random.default_rng(0)
  score = dataclasses.replace(CLASS, over="mean")
  row = rng.random(576).astype(np.float32)
  metric = rng.normal(size=(1, 576, 4)).astype(np.float32)
  answers = Answers().add(score.answered(0), jnp.asarray(row))
  answers = answers.add(Keys().answered(0), jnp.asarray(metric))
  made = Site(Tokens.create(jnp.zeros((576, 4))), answers, keep)
  rule = jax.jit(
    lambda: dominant_and_contextual(
      made, share=(5, 32), score=score, metric=Keys()
    )
  )
  plan = rule()
  assert plan.num_outputs == keep
  best = np.sort(np.argsort(-row)[: keep - contextual])
  np.testing.assert_array_equal(plan.anchor[: keep - contextual], best)
  joined = np.asarray(plan.index)
  assert (joined < keep).all() and plan.anchor_weight.tolist() == [1.0] * keep


def test_prumerge_counts_scores_above_the_quartiles():
  score = jnp.asarray([0.02, 0.03, 0.05, 0.1, 0.8])
  padded = jnp.append(score, jnp.asarray([9.0, 9.0]))
  assert jax.jit(prumerge.outliers)(padded, jnp.arange(7) < 5) == 1


def test_greedy_selections_of_their_cards():
  """E4: the farthest points, and a determinant with relevance."""
  x = jnp.asarray([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], jnp.float32)
  distance = 1 - scores.cosine(x, x)
  first = diversity.nearest_other(distance)
  np.testing.assert_array_equal(first, jnp.sort(distance, axis=0)[1])
  double = jnp.asarray([[0, 0, 2.0], [0, 0, 1], [2, 1, 0]])
  np.testing.assert_array_equal(diversity.nearest_other(double), [0, 0, 1])
  some = diversity.nearest_other(double, jnp.asarray([True, False, True]))
  np.testing.assert_array_equal(some, [2, 1, 2])
  np.testing.assert_array_equal(diversity.nearest_other(double[:1, :1]), [0])
  found = diversity.max_min(distance, 3, first=first)
  np.testing.assert_array_equal(found.index, [3, 0, 2])
  start = jnp.asarray([0.0, 1, 0, 0])
  found = diversity.max_min(distance, 3, first=start)
  np.testing.assert_array_equal(found.index, [1, 3, 2])
  found = diversity.max_min(distance, 3, first=start, over="all")
  np.testing.assert_array_equal(found.index, [1, 3, 0])
  padded = jnp.pad(distance, (0, 2), constant_values=9.0)
  mask = jnp.arange(6) < 4
  found = diversity.max_min(
    padded, 5, first=jnp.pad(start, (0, 2), constant_values=9.0), mask=mask
  )
  np.testing.assert_array_equal(found.index[:4], [1, 3, 2, 0])
  np.testing.assert_array_equal(found.valid, [1, 1, 1, 1, 0])
  relevance = jnp.asarray([0.2, 1, 0.5, 0.9])
  kernel = relevance[:, None] * (1 - distance) * relevance[None]
  found = diversity.determinantal(kernel, 4)
  np.testing.assert_array_equal(found.index[:2], [1, 3])
  assert sorted(found.index.tolist()) == [0, 1, 2, 3]
  found = diversity.determinantal(kernel, 3, count=jnp.int32(2))
  np.testing.assert_array_equal(found.valid, [1, 1, 0])
  # Beyond the rank, 3, the others come in their order.
  x = jnp.asarray(np.random.default_rng(4).normal(size=(30, 3)), "float32")
  found = diversity.determinantal(scores.cosine(x, x), 9)
  picked = found.index.tolist()
  assert picked[3:] == sorted(set(range(30)) - set(picked[:3]))[:6]


def test_coverage_of_its_card():
  """E4: first gains on raw cosines 1.8, 2.4, 1.6, 1.0; then by softmax."""
  x = jnp.asarray([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], jnp.float32)
  cosine = scores.cosine(x, x)
  found = jax.jit(lambda c: diversity.coverage(c, 3))(cosine)
  np.testing.assert_array_equal(found.index, [1, 3, 2])
  worth = jax.nn.softmax(cosine / 0.2, axis=1)
  np.testing.assert_allclose(
    worth.sum(axis=0), [0.978, 1.051, 0.972, 0.999], atol=1e-3
  )
  padded = jnp.pad(worth, (0, 2), constant_values=9.0)
  found = jax.jit(
    lambda w: diversity.coverage(
      w, 5, mask=jnp.arange(6) < 4, count=jnp.int32(3)
    )
  )(padded)
  np.testing.assert_array_equal(found.index[:3], [1, 3, 2])
  np.testing.assert_array_equal(found.valid, [1, 1, 1, 0, 0])


def test_duplicates_go_some_at_a_time_also_where_padded():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(9, 3)).astype(np.float32)
  score = rng.permutation(9)
  seen = slow.Seen(
    np.concatenate([x[:1], x]), [np.append(0, -score)[None, None]], [],
    (x, x), 3,
  )  # fmt: skip
  of = jax.jit(
    lambda x, mask, few: diversity.distinct(
      scores.cosine(x, x), 4, order=jnp.asarray([*score, -1, -2]), step=2,
      mask=mask, count=few,
    )  # fmt: skip
  )
  padded = jnp.pad(x, ((0, 2), (0, 0)), constant_values=1.0)
  mask = jnp.arange(11) < 9
  for few in (4, 1):
    expected = slow.vispruner(seen, few, 0.0, 2)
    np.testing.assert_array_equal(
      x[np.asarray(of(padded, mask, jnp.int32(few)))[:9]], expected
    )
  # Fewer than asked for all remain.
  assert of(padded, jnp.arange(11) < 3, jnp.int32(4)).tolist() == (
    [True] * 3 + [False] * 8
  )


@pytest.mark.parametrize(("keep", "weight"), [(20, 0.01), (8, 0.0), (8, 0.02)])
def test_folding_merges_as_a_slow_version_also_where_padded(keep, weight):
  n, room, rng = 37, 40, np.random.default_rng(5)
  x, keys = rng.normal(size=(2, room, 6)).astype(np.float32)
  row = rng.dirichlet(np.ones(room)).astype(np.float32)
  size = rng.uniform(1, 3, room).astype(np.float32)
  (reduce,) = recipes.get("folder", weight=weight).tower("vision").reduce

  @jax.jit
  def merged(x, keys, row, size, mask):
    answers = Answers().add(Keys().answered(0), keys[None])
    answers = answers.add(CLASS_MEAN.answered(0), row)
    tokens = Tokens.create(x, mask=mask).replace(size=size)
    plan = reduce.rule(Site(tokens, answers, keep))
    return plan.apply(x), plan.valid

  expected = slow.fold(x[:n], keys[:n], row[:n], size[:n], keep, weight)
  alone, _ = merged(x[:n], keys[:n], row[:n], size[:n], None)
  np.testing.assert_allclose(alone, expected, **CLOSE)
  padded, valid = merged(x, keys, row, size, jnp.arange(room) < n)
  np.testing.assert_allclose(padded[valid], expected, **CLOSE)


def test_flowcut_cuts_as_a_slow_encoder():
  config = ViTConfig(
    image_size=12, patch_size=2, width=16, depth=5, heads=2, mlp_dim=24,
    num_classes=None, pool="none",
  )  # fmt: skip
  tokens = hosts.VisionHost("deep", config).tokens(BATCH, 36)
  slots = recipes.get("flowcut", budget=SEVEN)
  encoder = Encoder(config, slots.tower("vision"), jnp.float32)
  shapes = jax.eval_shape(
    lambda t: encoder.init(jax.random.key(0), t, grid=(6, 6))["params"], tokens
  )
  params = draw_params(shapes)
  found, out = jax.jit(
    lambda p, t: encoder.apply({"params": p}, t, grid=(6, 6)),
    compiler_options=QUICK,
  )(params, tokens)
  assert [len(made) for made in out["plans"]] == [0, 1, 0, 1, 0]
  ours = np.asarray(out["plans"][1][0].valid).sum(axis=1) - 1
  numbers = set()
  as64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for b in range(BATCH):
    x, counts = selection_reference.flowcut(
      as64, np.asarray(tokens.x[b], np.float64), 2, 7, config.epsilon
    )
    assert counts == [36, ours[b], ours[b], 7, 7]
    np.testing.assert_allclose(found.x[b], x, **CLOSE)
    numbers.add(counts[1])
  assert len(numbers) > 1 and min(numbers) > 7


def test_room_of_flowcut_falls_to_what_remains():
  budget = budgets.EveryOther(budgets.Count(64))
  counts = [n for n in budget.counts(576, 23) if n is not None]
  acting = [i for i, n in enumerate(budget.counts(576, 23)) if n is not None]
  assert acting == list(range(1, 22, 2)) and counts[-1] == 64
  assert counts == sorted(counts, reverse=True) and counts[0] < 576
  full = budgets.EveryOther(budgets.Count(64), evenness=1.0)
  assert set(full.counts(576, 23)[:-2]) == {None, 576}
  # Its card: one-hot attention removes 114 of 576 in block 1.
  single = budgets.EveryOther(budgets.Count(64), evenness=0.0)
  assert single.counts(576, 23)[1] == 576 - 114
  assert not any(budget.with_keep(1.0).counts(576, 23))
  with pytest.raises(budgets.BudgetError, match="evenness=1.5"):
    budgets.EveryOther(0.5, evenness=1.5)


def test_keeping_everything_leaves_the_plain_tower():
  plain = see(Slots())
  for name in ("visionzip", "prumerge_plus", "divprune"):
    slots = recipes.get(name, keep=1.0)
    x = see(slots).x[:, -36:]
    np.testing.assert_allclose(x, plain.x, **CLOSE)
