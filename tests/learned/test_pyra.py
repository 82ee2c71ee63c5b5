"""PYRA: its card and a NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.learned import models, reference
from tokjax import learned, recipes
from tokjax.budgets import Constant
from tokjax.plan import Assignment, move
from tokjax.recipes.vision import merging
from tokjax.reduce.site import Site
from tokjax.reduce.stage import Stage
from tokjax.signals import Answers, Keys
from tokjax.tokens import Kind, Tokens

R, PATCHES, WIDTH = 4, 12, 6


def own(params, name, change):
  """The parameters with `change` applied to those of `name` in all blocks."""

  def one(path, leaf):
    found = name in jax.tree_util.keystr(path)
    return change(leaf) if found else leaf

  return jax.tree_util.tree_map_with_path(one, params)


@pytest.fixture(scope="module")
def pyra():
  """Model, and parameters as they are before the first step."""
  model = models.build("pyra", budget=Constant(4), rank=2)
  return model, models.init(model)


def logits(model, params):
  return models.apply(model, params, models.images())[0]


def test_it_starts_as_tome(pyra):
  model, params = pyra
  tome = models.build("tome", budget=Constant(4))
  np.testing.assert_array_equal(logits(model, params), logits(tome, params))
  assert model.slots.proportional


def test_weights_of_ranks_count_once_those_of_channels_are_not_zero(pyra):
  model, params = pyra
  start = logits(model, params)
  ranks = own(params, "by_rank", lambda w: w + 3.0)
  np.testing.assert_array_equal(logits(model, ranks), start)
  # Pairs are normed: a constant would add up to nothing.
  channels = own(
    params, "by_channel", lambda w: w + jnp.linspace(0, 1, w.size)[None]
  )
  moved = logits(model, channels)
  assert np.abs(moved - start).max() > 1e-3
  both = own(channels, "by_rank", lambda w: w + 3.0)
  assert np.abs(logits(model, both) - moved).max() > 1e-3


def test_initial_weights(pyra):
  params = pyra[1]["encoder"]["block_0"]["learned_0"]
  assert not params["by_channel"].any()
  assert params["by_rank"].shape == (4, 1)
  # Kaiming's bound at a fan-in of one is one, whatever the number of pairs.
  every = [
    pyra[1]["encoder"][f"block_{i}"]["learned_0"]["by_rank"] for i in range(3)
  ]
  every = np.concatenate(every)
  assert np.abs(every).max() <= 1
  assert np.abs(every).max() > 0.5


def test_against_numpy_in_rank_order():
  rng = np.random.default_rng(5)
  n = PATCHES + 1
  x = rng.normal(size=(n, WIDTH)).astype("float32")
  size = rng.integers(1, 4, size=n).astype("float32")
  keys = rng.normal(size=(2, n, 3)).astype("float32")
  kind = jnp.array([Kind.CLASS] + [Kind.PATCH] * PATCHES, jnp.int32)
  tokens = Tokens.create(jnp.asarray(x), kind=kind).replace(
    size=jnp.asarray(size)
  )
  answers = Answers((Keys().answered(0),), (jnp.asarray(keys),))
  site = Site(tokens, answers, PATCHES - R, protected=1)
  plan = site.lift(merging.tome_rule(site, sides="alternating"))

  (reduce,) = recipes.get("pyra").reduce
  stage = Stage(reduce, PATCHES - R, 0, 1, 1, PATCHES)
  batch = lambda tree: jax.tree.map(lambda v: v[None], tree)
  module = learned.PairModulation()
  given = batch(tokens), batch(plan), stage
  params = module.init(jax.random.key(0), *given, method="modulate")["params"]
  params = models.scattered(params)
  changed = module.apply({"params": params}, *given, method="modulate")
  params = jax.device_get(params)
  found = move(plan, jax.tree.map(lambda v: v[0], changed))

  pairs = reference.best_pairs(keys.mean(axis=0), R, 1)
  src, dst = map(np.array, zip(*pairs, strict=True))
  sources = reference.modulate(
    x[src], x[dst], size[src], size[dst],
    params["by_rank"][:, 0], params["by_channel"][0], params["norm"],
  )  # fmt: skip
  total, mass = x * size[:, None], size.copy()
  for i, (a, b) in enumerate(pairs):
    total[b] += sources[i] * size[a]
    mass[b] += size[a]
  stay = [j for j in range(0, n, 2) if j not in src] + list(range(1, n, 2))
  expected = total[stay] / mass[stay][:, None]
  np.testing.assert_allclose(found.x, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found.size, mass[stay])


def test_the_modulation_belongs_to_a_number_of_pairs(pyra):
  _, params = pyra
  fewer = models.build("pyra", budget=Constant(3), rank=2)
  with pytest.raises(Exception, match="by_rank"):
    logits(fewer, params)


def test_a_rule_that_does_not_merge_is_refused():
  tokens = jax.vmap(Tokens.create)(jnp.ones((1, 4, 2)))
  drop = jax.tree.map(lambda v: v[None], Assignment.select(jnp.arange(2), 4))
  (reduce,) = recipes.get("pyra").reduce
  with pytest.raises(ValueError, match="merge pairs"):
    learned.PairModulation().init(
      jax.random.key(0), tokens, drop, Stage(reduce, 2, 0, 1, 0, 4),
      method="modulate",
    )  # fmt: skip
