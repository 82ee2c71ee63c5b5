"""TokenLearner: its card and a NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.learned import models, reference
from tokjax import learned, recipes
from tokjax.plan import move
from tokjax.recipes.vision import learned as rules
from tokjax.reduce.site import Site
from tokjax.reduce.stage import Stage
from tokjax.signals import Answers
from tokjax.tokens import Kind, Tokens

KEEP, PATCHES, WIDTH = 3, 10, 8


@pytest.fixture(scope="module")
def pooled():
  """`f(x [n, d]) -> Tokens` after the rule; the class token is the first."""
  (reduce,) = recipes.get("token_learner").reduce
  stage = Stage(reduce, KEEP, 1, 2, 1, PATCHES)
  kind = jnp.array([Kind.CLASS] + [Kind.PATCH] * PATCHES, jnp.int32)
  module = learned.TokenLearner()

  def tokens(x):
    return Tokens.create(x, kind=kind)

  batch = lambda x: jax.tree.map(lambda v: v[None], tokens(x))
  x = jnp.zeros((PATCHES + 1, WIDTH))
  params = module.init(jax.random.key(0), batch(x), Answers(), stage)["params"]
  params = models.scattered(params, 0.8)

  @jax.jit
  def run(x):
    logits = module.apply({"params": params}, batch(x), Answers(), stage)[0]
    site = Site(tokens(x), Answers(), KEEP, protected=1, learned=logits)
    return move(site.lift(rules.token_learner_rule(site)), site.tokens)

  return run, jax.device_get(params)


def features(seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(PATCHES + 1, WIDTH)), jnp.float32)


def test_against_numpy(pooled):
  run, params = pooled
  x = features()
  out, x = run(x), np.asarray(x)
  np.testing.assert_array_equal(out.x[0], x[0])
  expected = reference.token_learner(params, x[1:])
  np.testing.assert_allclose(out.x[1:], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(out.size.sum(), PATCHES + 1, rtol=1e-5)


def test_a_constant_comes_back_as_itself(pooled):
  run, _ = pooled
  x = jnp.tile(features()[:1], (PATCHES + 1, 1))
  np.testing.assert_allclose(run(x).x, x[: KEEP + 1], rtol=1e-5)


def test_the_order_of_tokens_does_not_matter(pooled):
  run, _ = pooled
  x = features(1)
  order = np.random.default_rng(2).permutation(PATCHES) + 1
  shuffled = jnp.concatenate([x[:1], x[order]])
  np.testing.assert_allclose(run(shuffled).x, run(x).x, rtol=1e-4, atol=1e-5)


def test_no_two_outputs_take_one_place():
  weight = jnp.array([[0.1, 0.7, 0.2], [0.2, 0.6, 0.2], [0.0, 0.9, 0.1]])
  np.testing.assert_array_equal(rules.distinct_peaks(weight), [1, 0, 2])


def test_later_blocks_see_the_few():
  model = models.build("token_learner", keep=0.25)
  params = models.init(model)
  _, out = models.apply(model, params, models.images())
  assert out["tokens"].x.shape == (3, 1 + 4, models.SMALL.width)
  assert [len(made) for made in out["plans"]] == [0, 1, 0]
