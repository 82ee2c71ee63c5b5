import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import recipes
from tokjax.analysis import merge_map, stand_in
from tokjax.models import ViT, ViTConfig
from tokjax.plan import Assignment

CONFIG = ViTConfig(
  image_size=16, patch_size=4, width=16, depth=3, heads=2, mlp_dim=16,
  num_classes=3,
)  # fmt: skip


def batch(plan, count=1):
  return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * count), plan)


def parent(*values, m):
  plan = Assignment.from_parent(jnp.array(values), m)
  return batch(plan)


@functools.cache
def run(name, keep=0.5):
  """Intermediates of two random images, of a model with random weights."""
  model = ViT(CONFIG, recipes.get(name, keep=keep))
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
  key = jax.random.key(0)
  shapes = jax.eval_shape(ViT(CONFIG).init, key, images)
  draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes)
  return jax.jit(lambda p, x: model.apply(p, x, key=key)[1])(params, images)


@jax.jit
def matrices(plan):
  return jax.vmap(lambda p: p.matrix())(plan)


def test_provenance_is_the_product_of_the_matrices():
  out = run("tome", 0.4)
  plans = [plan for made in out["plans"] for plan in made]
  product = np.eye(17)[None].repeat(2, 0)
  for plan in plans:
    product = np.asarray(matrices(plan)) @ product
  whole = merge_map.provenance(out["plans"])[-1]
  np.testing.assert_allclose(matrices(whole), product, atol=1e-6)


def test_shares_of_merging_count_every_patch_once_and_sum_to_sizes():
  out = run("tome", 0.4)
  found = merge_map.groups(merge_map.provenance(out["plans"])[-1], (4, 4))
  np.testing.assert_allclose(found.share.sum(axis=1), 1.0)
  sizes = np.asarray(out["tokens"].size)
  np.testing.assert_allclose(found.share.sum(axis=2)[:, 1:], sizes[:, 1:])
  np.testing.assert_array_equal(found.num_tokens, 6)


def test_pruned_patches_are_known():
  out = run("topk", 0.5)
  found = merge_map.groups(merge_map.provenance(out["plans"])[-1], (4, 4))
  gone = (found.index < 0).sum(axis=(1, 2))
  np.testing.assert_array_equal(gone, 16 - found.num_tokens)
  assert (gone > 0).all()


def test_samplers_leave_room_that_is_padding():
  out = run("ats", 0.5)
  found = merge_map.groups(merge_map.provenance(out["plans"])[-1], (4, 4))
  real = np.asarray(out["tokens"].mask).sum(axis=1) - 1
  np.testing.assert_array_equal(found.num_tokens, real)


def test_plans_undone_within_their_block_are_not_composed():
  out = run("tomesd", 0.5)
  maps = merge_map.provenance(out["plans"])
  for made, whole in zip(out["plans"], maps, strict=True):
    np.testing.assert_array_equal(matrices(whole), matrices(made[0]))


def test_mixtures_show_the_token_that_took_most():
  out = run("token_transforming", 0.5)
  whole = merge_map.provenance(out["plans"])[-1]
  found = merge_map.groups(whole, (4, 4))
  np.testing.assert_allclose(found.share.sum(axis=1), 1.0, atol=1e-5)
  assert (found.index >= 0).all()


def test_a_smaller_image_groups_patches_by_cell():
  out = run("downsample", 0.25)
  found = merge_map.cells(out["tokens"].position, (4, 4))
  expected = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
  np.testing.assert_array_equal(found.index, [expected] * 2)
  np.testing.assert_array_equal(found.num_tokens, 4)


def test_a_model_is_looked_at_block_by_block():
  config, params = stand_in.build(16, patch_size=4, depth=3)
  image = jax.random.uniform(jax.random.key(2), (1, 16, 16, 3))
  model = ViT(config, recipes.get("tome", keep=0.5))
  key = jax.random.key(0)
  found = merge_map.look(model, params, image, key)
  assert [g.num_tokens.tolist() for g in found] == [[14], [11], [8]]
  (last,) = merge_map.look(model, params, image, key, every=False)
  np.testing.assert_array_equal(last.index, found[-1].index)
  plain = merge_map.look(ViT(config), params, image, key)
  assert [g.num_tokens.tolist() for g in plain] == [[16]] * 3


def test_painting_shows_means_outlines_and_what_is_dropped():
  """Patches 0 and 1 merge, 2 is dropped, 3 stays."""
  plan = parent(0, 0, 4, 3, m=2)
  found = merge_map.groups(plan, (2, 2))
  image = np.zeros((8, 8, 3), np.uint8)
  image[:4, :4], image[:4, 4:], image[4:] = 40, 120, 200
  plain = merge_map.paint(image, found.index[0], found.share[0], line=0)
  assert (plain[:4] == 80).all()
  np.testing.assert_array_equal(plain[4:, 4:], image[4:, 4:])
  assert plain[4:, :4].mean() < 60
  lined = merge_map.paint(image, found.index[0], found.share[0], line=1)
  assert (lined[3] != plain[3]).all()
  np.testing.assert_array_equal(lined[:3, 1:-1], plain[:3, 1:-1])
  np.testing.assert_array_equal(lined[5:, 5:], plain[5:, 5:])


def test_an_image_that_does_not_fit_the_grid_is_refused():
  found = merge_map.groups(None, (2, 2))
  with pytest.raises(ValueError, match="multiples of the 2x2 patches"):
    merge_map.paint(
      np.zeros((9, 8, 3), np.uint8), found.index[0], found.share[0]
    )


def test_the_stand_in_joins_patches_of_one_colour():
  """Two halves, red and blue: no token mixes them."""
  config, params = stand_in.build(32, patch_size=4, depth=4)
  image = np.full((1, 32, 32, 3), -1.0, np.float32)
  image[:, :, :16, 0], image[:, :, 16:, 2] = 1.0, 1.0
  model = ViT(config, recipes.get("tome", keep=0.2))
  out = jax.jit(model.apply)({"params": params}, image)[1]
  (share,) = merge_map.groups(
    merge_map.provenance(out["plans"])[-1], (8, 8)
  ).share
  red = share.reshape(-1, 8, 8)[:, :, :4].sum((1, 2))
  blue = share.reshape(-1, 8, 8)[:, :, 4:].sum((1, 2))
  assert (np.minimum(red, blue) == 0).all()


def test_the_stand_in_attends_to_warm_colours():
  config, params = stand_in.build(32, patch_size=4, depth=4)
  image = np.full((1, 32, 32, 3), -1.0, np.float32)
  image[:, :, :16, 0], image[:, :, 16:, 2] = 1.0, 1.0
  model = ViT(config, recipes.get("topk", keep=0.4))
  out = jax.jit(model.apply)({"params": params}, image)[1]
  (index,) = merge_map.groups(
    merge_map.provenance(out["plans"])[-1], (8, 8)
  ).index
  assert (index[:, 4:] < 0).all()
