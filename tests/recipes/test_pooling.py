"""Mean pooling that counts merged tokens by size, as MAE's patches do."""

import jax
import numpy as np
import pytest

from tokjax import recipes
from tokjax.models import ViT, ViTConfig

CONFIG = ViTConfig(
  image_size=16, patch_size=4, width=12, depth=2, heads=2, mlp_dim=24,
  pool="mean", head_norm="pooled", num_classes=5,
)  # fmt: skip


@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_merged_tokens_count_for_their_members(name):
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
  images = images.astype(np.float32)
  slots = recipes.get(name, keep=0.5, pool_by_size=True)
  model = ViT(CONFIG, slots)
  params = jax.jit(model.init)(jax.random.key(0), images)
  logits, out = jax.jit(model.apply)(params, images)
  head = jax.device_get(params["params"]["head"])
  size = np.asarray(out["tokens"].size)[:, 1:, None]
  assert size.max() > 1
  # The official sum over x * size, divided by the number of patches.
  x = (np.asarray(out["features"])[:, 1:] * size).sum(1) / 16
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
    x.var(-1, keepdims=True) + CONFIG.epsilon
  )
  x = x * head["norm"]["scale"] + head["norm"]["bias"]
  dense = head["classifier"]
  expected = x @ dense["kernel"] + dense["bias"]
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
