"""A loaded model on padded images, other sizes, in bfloat16, and in NNX."""

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.helpers import apply, config, images, random_params
from tokjax import Reduce, Slots, budgets, interop
from tokjax.models import ViT
from tokjax.recipes.vision.baselines import drop_by_stride

HALF = Slots((Reduce(drop_by_stride, budgets.Once(0.5), at="input"),))
FAMILIES = {
  "class": {},
  "mean": dict(pool="mean", head_norm="pooled", class_token=False),
  "map": dict(pool="map", class_token=False, num_classes=None),
  "clip": dict(
    pre_norm=True,
    patch_bias=False,
    head_norm="pooled",
    projection=16,
    num_classes=None,
    activation="quick_gelu",
  ),
  "dino": dict(registers=2, layer_scale=True, num_classes=None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_patches_do_not_matter(family):
  cfg = config(**FAMILIES[family])
  params, model = random_params(cfg), ViT(cfg)
  mask = np.ones((2, 4, 4), bool)
  mask[:, :, 3] = False
  mask[1, 2:] = False
  x, rng = images(), np.random.default_rng(2)
  pixels = mask.repeat(8, axis=1).repeat(8, axis=2)[..., None]
  noise = rng.normal(size=x.shape).astype(np.float32)
  masked = jnp.asarray(mask.reshape(2, 16))
  a, _ = apply(model, params, x, mask=masked)
  b, _ = apply(model, params, np.where(pixels, x, 50 * noise), mask=masked)
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  unmasked, _ = apply(model, params, x)
  assert np.abs(unmasked - a).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_bfloat16_and_near(family):
  cfg = config(**FAMILIES[family])
  params = random_params(cfg)
  x = images(40, 24)
  exact, full = apply(ViT(cfg), params, x)
  near, half = apply(ViT(cfg, dtype=jnp.bfloat16), params, x)
  assert near.dtype == half["tokens"].x.dtype == jnp.bfloat16
  assert half["features"].dtype == jnp.bfloat16
  for a, b in ((exact, near), (full["features"], half["features"])):
    spread = np.abs(np.asarray(a)).max()
    assert np.abs(np.asarray(a) - np.asarray(b, np.float32)).max() < (
      0.05 * spread
    )


def test_mean_pool_is_exact_in_bfloat16():
  """Weights 1/n rounded to bfloat16 would shift every mean."""
  cfg = config(
    pool="mean", class_token=False, num_classes=None, image_size=48, depth=1
  )
  model = ViT(cfg, dtype=jnp.bfloat16)
  pooled, out = apply(model, random_params(cfg), images(48, 48))
  mean = np.asarray(out["features"], np.float32).mean(axis=1)
  np.testing.assert_allclose(
    np.asarray(pooled, np.float32), mean, rtol=2**-8, atol=1e-6
  )


def test_image_size_override_equals_interpolating_at_every_call(tmp_path):
  interop.save(tmp_path, config(), random_params(config()))
  model, params, _ = interop.load(tmp_path)
  larger, larger_params, _ = interop.load(tmp_path, image_size=48)
  assert larger_params["embed"]["position"].shape == (1, 37, 32)
  x = images(48, 48)
  a, _ = apply(model, params, x)
  b, _ = apply(larger, larger_params, x)
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_loaded_model_is_built_with_slots(tmp_path):
  interop.save(tmp_path, config(), random_params(config()))
  model, params, _ = interop.load(tmp_path, slots=HALF)
  _, out = apply(model, params, images())
  assert out["tokens"].x.shape == (2, 9, 32)


def test_nnx_users_can_wrap_and_train_a_loaded_model(tmp_path):
  shallow = config(depth=1)
  interop.save(tmp_path, shallow, random_params(shallow))
  linen, params, _ = interop.load(tmp_path, slots=HALF)
  x = jnp.asarray(images())
  model = flax.nnx.bridge.ToNNX(linen, rngs=flax.nnx.Rngs(0))
  model = flax.nnx.bridge.lazy_init(model, x[:1])
  flax.nnx.update(model, flax.nnx.State(params))
  expected, _ = apply(linen, params, x)
  logits, out = flax.nnx.jit(lambda model, x: model(x))(model, x)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
  assert out["tokens"].num_tokens == 9

  def loss(model):
    return jnp.square(model(x)[0]).mean()

  grads = flax.nnx.jit(flax.nnx.grad(loss))(model)
  norms = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)]
  assert len(norms) == len(jax.tree.leaves(params))
  assert all(np.isfinite(norms))
  assert max(norms) > 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pool": "max"}, "pool='max': must be one of"),
    ({"activation": "relu"}, "activation='relu': must be one of"),
    ({"position_resize": "nearest"}, "position_resize='nearest'"),
    ({"pool": "none"}, "classes need pooled features"),
    (
      {"distillation_token": True, "pool": "mean"},
      "distillation_head=True: needs pool='class'",
    ),
  ],
)
def test_configurations_without_meaning(changes, message):
  # Past the type checker of the tests, as users call it.
  wrong = config()
  for name, value in changes.items():
    object.__setattr__(wrong, name, value)
  with pytest.raises(ValueError, match=message):
    wrong.__post_init__()
