"""Recipes before the language model, against slow versions and cards."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.multimodal import encoder_reference as slow
from tests.multimodal import vlm_models
from tokjax import budgets, diversity, recipes, scores
from tokjax.models import ViT
from tokjax.models.vlm import tokens_per_image
from tokjax.plan import Assignment
from tokjax.recipes.multimodal import merging, prumerge
from tokjax.recipes.multimodal.encoder import dominant_and_contextual
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Answers, Attention, Keys
from tokjax.slots import Slots
from tokjax.tokens import Tokens

CLOSE = dict(rtol=1e-4, atol=1e-4)
BATCH, COLUMNS = 3, 6
KEEP = budgets.Count(12)
# Options of a recipe, and its slow version for an encoder of 3 blocks.
CASES = {
  "visionzip": (dict(budget=KEEP), lambda s: slow.visionzip(s, 11, 2)),
  "fastervlm": (dict(budget=KEEP), lambda s: slow.by_class(s, 12)),
  "vtc_cls": (
    dict(budget=KEEP, blocks=2), lambda s: slow.by_class(s, 12, 2)
  ),
  "hiprune": (
    dict(budget=KEEP, share=0.8), lambda s: slow.hiprune(s, 12, 0.8, 1)
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
  slots = recipes.get(case.removesuffix("_rows"), **options)
  tokens = see(slots)
  count = tokens_per_image(vlm_models.config(), slots)
  assert tokens.x.shape[1] == count < 36
  for b in range(BATCH):
    x = np.asarray(tokens.x[b])
    x = x if tokens.mask is None else x[np.asarray(tokens.mask[b])]
    np.testing.assert_allclose(x, projected(expected(seen()[b])), **CLOSE)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_divprune_keeps_what_a_slow_version_keeps(share):
  tokens = see(recipes.get("divprune", budget=budgets.Once(share)))
  for b in range(BATCH):
    x = projected(seen()[b].hidden[1:])
    picked = slow.divprune(x, round(36 * share))
    np.testing.assert_allclose(tokens.x[b], x[picked], **CLOSE)


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
  first = jnp.sort(distance, axis=0)[1]
  found = diversity.max_min(distance, 3, first=first)
  np.testing.assert_array_equal(found.index, [3, 0, 2])
  start = jnp.asarray([0.0, 1, 0, 0])
  found = diversity.max_min(distance, 3, first=start)
  np.testing.assert_array_equal(found.index, [1, 3, 2])
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


def test_keeping_everything_leaves_the_plain_tower():
  plain = see(Slots())
  for name in ("visionzip", "prumerge_plus", "divprune"):
    slots = recipes.get(name, keep=1.0)
    x = see(slots).x[:, -36:]
    np.testing.assert_allclose(x, plain.x, **CLOSE)
