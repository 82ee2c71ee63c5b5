"""DyMU: thresholds, what merges by them, and attention at all places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.multimodal import vlm_models
from tokjax import learned, recipes
from tokjax.learned.threshold import best_edges, first_not_taken
from tokjax.models import unmerged
from tokjax.recipes.multimodal.dymu import merge_similar
from tokjax.reduce import lift
from tokjax.reduce.site import Site
from tokjax.reduce.stage import Stage
from tokjax.signals import Answers, Block, Keys
from tokjax.tokens import Kind, Tokens

LEVELS = (0.5, 0.6, 0.7)


def test_card_threshold_of_a_batch():
  # Two images with edges .9, .5 and .8, .7; one merge an image on average.
  best = jnp.array([[0.9, 0.5], [0.8, 0.7]])
  np.testing.assert_allclose(first_not_taken(best, 2), 0.7)
  assert first_not_taken(-best, 1) == 0


def tokens(n: int, front: int, seed: int) -> tuple[Tokens, np.ndarray]:
  rng = np.random.default_rng(seed)
  kind = jnp.array([Kind.CLASS] * front + [Kind.PATCH] * (n - front), jnp.int32)
  size = rng.integers(1, 4, n).astype(np.float32)
  x = rng.normal(size=(n, 5)).astype(np.float32)
  made = Tokens.create(jnp.asarray(x), kind=kind).replace(size=jnp.array(size))
  return made, rng.normal(size=(2, n, 3)).astype(np.float32)


def slow(x, size, keys, front: int, level: float):
  """One image at a time: members of each output, in order."""
  unit = keys.mean(0)
  unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
  even, odd = range(0, len(x), 2), range(1, len(x), 2)
  edges = []
  for i in even:
    if i >= front:
      best = max(odd, key=lambda j: unit[i] @ unit[j])
      edges.append((unit[i] @ unit[best], i, best))
  edges = sorted(edges, reverse=True)
  many = sum(edge > level for edge, _, _ in edges)
  many = min(many, (len(x) - front) // 2)
  gone = {i: j for _, i, j in edges[:many]}
  stay = [i for _, i, _ in edges[many:]]
  stay = sorted(stay) if front else stay
  out = [[i] for i in (*range(front), *stay)]
  out += [[j, *(i for i, to in gone.items() if to == j)] for j in odd]
  mean = [np.average(x[own], axis=0, weights=size[own]) for own in out]
  return np.stack(mean), np.array([size[own].sum() for own in out])


@pytest.mark.parametrize("front", [0, 1])
def test_merging_is_the_slow_one(front):
  for seed, level in enumerate((-1.0, 0.2, 0.6, 2.0)):
    own, keys = tokens(11, front, seed)
    answers = Answers().add(Keys(layer=Block(0)), jnp.asarray(keys))
    site = Site(
      own, answers, 11 - front, protected=front, learned=jnp.float32(level)
    )
    plan = lift.leading(merge_similar(site, thresholds=()), front)
    x, size, valid = plan.apply(own.x), plan.total(own.size), plan.valid
    expected = slow(np.asarray(own.x), np.asarray(own.size), keys, front, level)
    np.testing.assert_allclose(x[valid], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(size[valid], expected[1])


def test_edges_of_a_batch_leave_the_class_token_out():
  own, keys = tokens(8, 1, 0)
  batch = jax.tree.map(lambda x: x[None], own)
  best = np.asarray(best_edges(batch, jnp.asarray(keys)[None], 1))[0]
  assert best[0] == -np.inf and (best[1:] > -1).all()


def test_outputs_are_means_over_their_places():
  owner = jnp.array([[1, 0, 1, 2, 3]])
  real = jnp.array([[True, True, True, True, False]])
  x = jnp.arange(6.0).reshape(1, 3, 2)
  y = unmerged.spread(x, owner)
  np.testing.assert_array_equal(y[0, :, 0], [2, 0, 2, 4, 0])
  y = y.at[0, 2].add(1.0)
  mean = unmerged.gathered(y, owner, real, 3)
  np.testing.assert_array_equal(mean[0], [[0, 1], [2.5, 3.5], [4, 5]])


@pytest.fixture(scope="module")
def ragged():
  """Logits of ragged prompts, and those of the whole sequences at once."""
  made = vlm_models.generator(recipes.get("dymu", thresholds=LEVELS))
  prompts = vlm_models.PROMPTS[:3]
  images = vlm_models.images_of(prompts)
  packed, _ = made.pack(prompts, images)
  run = jax.jit(
    lambda params, x: made.model.apply({"params": params}, x),
    compiler_options=QUICK,
  )
  logits, out = run(made.params, packed)
  last = [x[n - 1] for x, n in zip(logits, packed.length, strict=True)]
  going = made.prefill(prompts, images)
  return going, np.stack(last), out["remains"].sum(axis=1), made.bytes(going)


def test_prompts_go_on_where_every_place_counts(ragged):
  going, last, remains, size = ragged
  np.testing.assert_allclose(going.logits, last, atol=2e-5)
  # 36 patches stand for an image, and fewer tokens go through the blocks.
  np.testing.assert_array_equal(going.position, [40, 2, 74])
  assert remains[0] < 4 + 18 and remains[1] == 2
  whole = vlm_models.generator()
  assert whole.image_tokens == 36
  assert size.physical > 0


def test_refused():
  for options, message in (
    (dict(thresholds=(0.5,)), "thresholds=.*must be 3 numbers"),
    (dict(thresholds="found"), "thresholds='found'"),
    (dict(average=0.0), "average=0.0"),
  ):
    with pytest.raises(ValueError, match=f"(?s){message}"):
      vlm_models.model(recipes.get("dymu", **options))
  for other in ("fastv", "visionzip"):
    with pytest.raises(ValueError, match="(?s)dymu.*use"):
      vlm_models.model(recipes.compose("dymu", other, keep=0.5))


def test_a_learned_threshold_tends_to_that_of_the_batch():
  module = learned.Threshold(0.5)
  own, keys = tokens(8, 0, 3)
  batch = jax.tree.map(lambda x: x[None], own)
  (vision,) = recipes.get("dymu").tower("vision").reduce
  stage = Stage(vision, 6, 0, 2, 0, 8)
  answers = Answers().add(Keys(layer=Block(0)), jnp.asarray(keys)[None])
  own = {"params": {"threshold": jnp.float32(0.5)}}
  used, sown = module.apply(own, batch, answers, stage, mutable=["losses"])
  # Half of eight patches in two blocks: two of them in this one.
  best = np.sort(np.asarray(best_edges(batch, jnp.asarray(keys)[None], 0))[0])
  np.testing.assert_allclose(used, [best[-3]], rtol=1e-6)
  gap = sown["losses"]["threshold"]
  np.testing.assert_allclose(gap, (0.5 - best[-3]) ** 2 / 2, rtol=1e-5)
  np.testing.assert_allclose(module.apply(own, batch, answers, stage), [0.5])
