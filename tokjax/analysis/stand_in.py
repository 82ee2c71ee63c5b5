"""A vision transformer that sees colours, for pictures without a checkpoint.

Nothing in it is learned: a token is the mean colour of its patch, its coarse
texture and a little of its place, blocks leave tokens as they are, and keys
are the tokens. Methods that compare tokens therefore join patches that look
alike; the class token attends to warm colours, so that methods that follow its
attention keep those. It shows what a rule does with sensible features, and
says nothing about accuracy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models import ViT, ViTConfig

NAME = "weights: none learned, tokens are the colours of their patches"
# Brightness, warm against cold, green against magenta; how much they count.
COLOURS = np.array([[1, 1, 1], [2, 0, -2], [-1, 2, -1]]) / 3
COLOUR_WEIGHT = (1.0, 2.5, 2.5)
# Coarse waves across a patch, (rows, columns), and how much they count.
WAVES = {(0, 0): 1.0, (0, 1): 0.35, (1, 0): 0.35, (1, 1): 0.2}
# Of the place in the image, and of the constant that lets keys, which are
# normalised, tell a pale patch from a strong one.
PLACE, CONSTANT = 0.25, 0.5
# Of the class token's attention.
SHARPNESS = 2.0


def build(
  image_size: int, patch_size: int = 16, depth: int = 12
) -> tuple[ViTConfig, dict[str, Any]]:
  """Architecture and parameters, for images with values in [-1, 1]."""
  half = len(COLOURS) * len(WAVES) + 3
  config = ViTConfig(
    image_size=image_size,
    patch_size=patch_size,
    width=2 * half,
    depth=depth,
    heads=1,
    mlp_dim=2 * half,
    num_classes=2,
  )
  side = jnp.zeros((1, image_size, image_size, 3))
  shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), side)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)["params"]
  embed = params["embed"]
  embed["patch"]["kernel"][:] = _mirrored(_patch_kernel(patch_size, half))
  constant = np.zeros(half)
  constant[-1] = CONSTANT
  embed["patch"]["bias"][:] = _mirrored(constant)
  embed["position"][0, 1:] = _mirrored(_places(config.grid, half))
  warm = np.zeros(half)
  warm[len(WAVES)] = 1.0
  embed["class_token"][:] = _mirrored(warm)
  for block in params["encoder"].values():
    block["norm1"]["scale"][:] = 1.0
    block["attention"]["key"]["kernel"][:] = np.eye(2 * half)
    block["attention"]["query"]["kernel"][:] = SHARPNESS * np.eye(2 * half)
  return config, params


def _mirrored(features: np.ndarray) -> np.ndarray:
  """Features and their negatives: LayerNorm then only scales."""
  return np.concatenate([features, -features], axis=-1)


def _patch_kernel(patch: int, half: int) -> np.ndarray:
  """Every colour axis times every wave, `[patch, patch, 3, half]`."""
  at = (np.arange(patch) + 0.5) * np.pi / patch
  kernel = np.zeros((patch, patch, 3, half))
  feature = 0
  for colour, strength in zip(COLOURS, COLOUR_WEIGHT, strict=True):
    for (y, x), weight in WAVES.items():
      wave = np.cos(y * at)[:, None] * np.cos(x * at)[None, :] / patch**2
      kernel[..., feature] = strength * weight * wave[..., None] * colour
      feature += 1
  return kernel


def _places(grid: tuple[int, int], half: int) -> np.ndarray:
  """Rows and columns in [-1, 1], `[rows * columns, half]`."""
  rows, columns = (np.linspace(-1, 1, n) for n in grid)
  table = np.zeros((grid[0] * grid[1], half))
  table[:, -3] = PLACE * rows.repeat(grid[1])
  table[:, -2] = PLACE * np.tile(columns, grid[0])
  return table
