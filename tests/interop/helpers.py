"""Small checkpoints and forward passes, without torch."""

import functools

import jax
import numpy as np
from safetensors import safe_open

from tokjax.models import ViT, ViTConfig

SMALL = dict(
  image_size=32, patch_size=8, width=32, depth=2, heads=4, mlp_dim=48
)


def config(**changes) -> ViTConfig:
  return ViTConfig(**{**SMALL, "num_classes": 5, **changes})


def random_params(config: ViTConfig, seed: int = 0):
  """Parameters that are all drawn, and different from each other."""
  images = np.zeros((1, *config.image_sides, 3), np.float32)
  shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), images)
  leaves, tree = jax.tree.flatten(shapes["params"])
  rng = np.random.default_rng(seed)
  drawn = [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
  return jax.tree.unflatten(tree, drawn)


def images(height=32, width=32, batch=2, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(batch, height, width, 3)).astype(np.float32)


@functools.cache
def compiled(model: ViT):
  return jax.jit(lambda p, x, o: model.apply({"params": p}, x, **o))


def apply(model, params, images, **options):
  """The jitted forward pass; equal models share a compilation."""
  return compiled(model)(params, images, options)


def stored(folder) -> dict[str, np.ndarray]:
  """All tensors of a folder's safetensors."""
  found = {}
  for path in folder.glob("*.safetensors"):
    with safe_open(path, "np") as file:
      found |= {name: file.get_tensor(name) for name in file.keys()}
  return found


def assert_same_tensors(a, b):
  assert sorted(a) == sorted(b)
  for name, value in a.items():
    assert value.dtype == b[name].dtype, name
    np.testing.assert_array_equal(value, b[name], err_msg=name)
