"""Small models of learned recipes, with parameters that are not the initial."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import recipes
from tokjax.models import ViT, ViTConfig
from tokjax.slots import Slots

SMALL = ViTConfig(
  image_size=8,
  patch_size=2,
  width=16,
  depth=3,
  heads=2,
  mlp_dim=32,
  num_classes=5,
)


def build(slots: str | Slots, **options) -> ViT:
  """The small model with a recipe or slots."""
  if isinstance(slots, str):
    slots = recipes.get(slots, **options)
  return ViT(SMALL, slots)


def images(batch: int = 3) -> jax.Array:
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(batch, 8, 8, 3)), jnp.float32)


def init(model: ViT):
  """Parameters as training starts with them."""
  key = jax.random.key(0)
  run = jax.jit(lambda x: model.init(key, x, key=key)["params"])
  return run(images(1))


def scattered(params, spread: float = 0.5):
  """Parameters with noise, the same for a name in every model."""

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.normal(size=leaf.shape).astype("float32")
    return jnp.asarray(leaf) + spread * noise

  return jax.tree_util.tree_map_with_path(draw, params)


def apply(model: ViT, params, x, **options):
  """(output, out), compiled."""
  run = jax.jit(lambda p, x: model.apply({"params": p}, x, **options))
  return run(params, x)
