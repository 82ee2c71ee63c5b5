"""Bad input is an error when the model is built, or has a defined result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import Reduce, budgets, recipes
from tokjax.models.vit import ViT, ViTConfig
from tokjax.signals import Keys, Rows

TINY = ViTConfig(
  image_size=16, patch_size=4, width=12, heads=3, mlp_dim=24, depth=4,
  num_classes=3,
)  # fmt: skip
BARE = ViTConfig(
  image_size=16, patch_size=4, width=12, heads=3, mlp_dim=24, depth=4,
  num_classes=3, class_token=False, pool="mean",
)  # fmt: skip
ONE = ViTConfig(
  image_size=4, patch_size=4, width=12, heads=3, mlp_dim=24, depth=4,
  num_classes=3,
)  # fmt: skip


def vit(name, config=TINY, **options):
  return ViT(config, recipes.get(name, **options))


@functools.cache
def parameters():
  """Those of the plain model: no recipe here adds any."""
  init = jax.jit(vit("none").init)
  return init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_keep_must_be_a_fraction_for_every_recipe(as_users_run_it):
  for name in recipes.names():
    for keep in (0, -0.1, 1.01, float("nan"), float("inf"), "0.5"):
      with pytest.raises(ValueError, match=r"keep.*=.*\(0, 1\]"):
        recipes.get(name, keep=keep)


BUILT = {
  "no such recipe, a near one": (
    lambda: recipes.get("evti"),
    r"unknown recipe 'evti'; did you mean evit\? Known are: none,",
  ),
  "no such recipe at all": (
    lambda: recipes.get("xyzzy"),
    r"unknown recipe 'xyzzy'\. Known are: none,",
  ),
  "no such option": (
    lambda: recipes.get("evit", ratio=0.3),
    r"recipe 'evit': unknown option 'ratio'; its options are keep, budget",
  ),
  "a number for a budget": (
    lambda: recipes.get("evit", budget=0.5),
    r"budget=0.5: must be a Budget; see tokjax\.budgets",
  ),
  "no such sampling": (
    lambda: recipes.get("ats", sampling="uniform"),
    r"sampling='uniform': must be 'code' or 'paper'",
  ),
  "similar beyond one": (
    lambda: recipes.get("zero_tprune", similar=1.5),
    r"similar=1.5: must lie in \[0, 1\]",
  ),
  "bounds the wrong way round": (
    lambda: recipes.get("zero_tprune", variance=(0.7, 0.01)),
    r"variance=\(0.7, 0.01\): .*low <= high",
  ),
  "area beyond one": (
    lambda: recipes.get("downsample", keep_area=2.0),
    r"keep_area=2.0: must lie in \(0, 1\]",
  ),
  "no such signal": (
    lambda: Rows(form="attn"),
    r"form='attn': must be one of \('softmax', 'logits', 'by_rotation'\)",
  ),
  "a block to come": (
    lambda: Keys(layer=1),
    r"layer=1: must be 0 or less, relative to the block that asks",
  ),
  "no such place": (
    lambda: Reduce(len, budgets.Even(0.5), at="after_mlp"),
    r"at='after_mlp': must be one of \['attention', 'input'",
  ),
  "more than there is": (
    lambda: vit("topk", budget=budgets.Constant(5)),
    r"topk: .*block 3: 1 are left and 5 would be removed.*Remove fewer",
  ),
  "more than can pair": (
    lambda: vit("tome", budget=budgets.Constant(9)),
    r"tome: block 0 would remove 9 of 16 .*at most 8\. Spread",
  ),
  "a block the model has not": (
    lambda: vit("topk", budget=budgets.Ratio(0.5, (4,))),
    r"layers=4: must be a block in 0\.\.3",
  ),
  "one token, and a share of it": (
    lambda: vit("random", ONE),
    r"random: .*block 1: 1 are left and 1 would be removed",
  ),
  "a signal the model has not": (
    lambda: vit("evit", BARE),
    r"recipe 'evit', slot 'reduce': asks .*\['CLASS'\].*class_token=False"
    r".*it has \['PATCH'\]",
  ),
  "attention before there is any": (
    lambda: vit("zero_tprune", budget=budgets.Once(0.5, 0)),
    r"recipe 'zero_tprune' asks .*before block 0.*schedule it for later",
  ),
  "a grid that is gone": (
    lambda: vit("avgpool", budget=budgets.Ratio(0.7)),
    r"recipe 'avgpool'.*gone after block 1.*for block 2;.*Once or Square",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILT)
def test_building_says_what_is_wrong(case, as_users_run_it):
  build, message = BUILT[case]
  with pytest.raises((ValueError, KeyError, TypeError), match=message):
    build()


IMAGES = np.ones((2, 16, 16, 3), np.float32)
CALLED = {
  "mask of another length": (
    "topk", IMAGES, {"mask": np.ones((2, 9), bool)},
    r"mask of shape \(2, 9\).*\(2, 16\)",
  ),
  "mask of floats": (
    "topk", IMAGES, {"mask": np.ones((2, 16), np.float32)},
    r"mask of .*float32: must be .*bool",
  ),
  "an image without a batch": (
    "topk", IMAGES[0], {}, r"images of shape \(16, 16, 3\): must be"
  ),
  "grey images": (
    "topk", IMAGES[..., :1], {}, r"images of shape \(2, 16, 16, 1\): .*3\]"
  ),
  "part of a patch": (
    "topk", IMAGES[:, 1:], {}, r"images of 15x16 pixels: .*patch_size=4"
  ),
  "chance without a key": (
    "random", IMAGES, {}, r"recipe 'random' is random: pass key="
  ),
  "a mask on a grid": (
    "avgpool", IMAGES, {"mask": np.ones((2, 16), bool)},
    r"recipe 'avgpool' works on a complete grid.*mask",
  ),
  "a mask on a smaller image": (
    "downsample", IMAGES, {"mask": np.ones((2, 16), bool)},
    r"recipe 'downsample' changes the image.*mask",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLED)
def test_calling_says_what_is_wrong(case, as_users_run_it):
  name, images, options, message = CALLED[case]
  model, weights = vit(name), parameters()
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda i: model.apply(weights, i, **options), jnp.asarray(images)
    )


@pytest.mark.parametrize("name", ["stride", "center", "topk", "evit", "ats"])
def test_one_token_is_kept_where_the_rule_can(name):
  model = vit(name, ONE)

  def run(key):
    (_, out), _ = model.init_with_output(key, jnp.zeros((1, 4, 4, 3)))
    return out["tokens"].x

  assert jax.eval_shape(run, jax.random.key(0)).shape == (1, 2, 12)


@pytest.mark.parametrize("name", ["evit", "center"])
def test_nan_and_nothing_stay_in_their_examples(name):
  """One image of NaN, one that is all padding, one that is neither."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
  images[0] = np.nan
  mask = np.ones((3, 16), bool)
  mask[1] = False
  mask[2, 11:] = False
  model, weights = vit(name), parameters()

  @jax.jit
  def run(images, mask):
    return model.apply(weights, images, mask=mask)[0]

  logits = run(images, mask)
  usual = run(np.broadcast_to(images[2:], images.shape), mask[[2, 2, 2]])
  assert np.all(np.isnan(logits[0]))
  assert np.all(np.isfinite(logits[1]))
  np.testing.assert_array_equal(logits[2], usual[2])
