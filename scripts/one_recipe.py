"""One recipe in a small model: whether the installed package works alone."""

import jax
import jax.numpy as jnp

import pallas_kernels
import tokjax
from tokjax import recipes
from tokjax.models import ViT, ViTConfig

config = ViTConfig(
  image_size=16, patch_size=2, width=32, depth=2, heads=2, mlp_dim=64,
  num_classes=5,
)  # fmt: skip
model = ViT(config, recipes.get("tome", keep=0.5))
images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
params = jax.jit(model.init)(jax.random.key(1), images)
logits, out = jax.jit(model.apply)(params, images)
assert logits.shape == (2, 5) and bool(jnp.isfinite(logits).all())
tokens = out["tokens"].x.shape[1]
assert tokens < 65, "no token was merged"
print(
  f"tokjax {tokjax.__version__} from {tokjax.__file__},"
  f" pallas_kernels from {pallas_kernels.__file__}: tome leaves {tokens} of 65"
  " tokens"
)
