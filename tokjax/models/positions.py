"""Position tables for another grid than the one they were learned on.

Published models disagree on the resize, and the differences are far above
rounding, so the configuration names one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Cubic coefficient of torch's `interpolate(mode="bicubic")`; with antialiasing
# torch, like Pillow and `jax.image`, takes -0.5.
TORCH_CUBIC = -0.75
RESIZES = ("bicubic", "bicubic_antialias", "bilinear_antialias")


def resize_table(
  table: Float[Array, "1 n d"],
  grid: tuple[int, int],
  new: tuple[int, int],
  resize: str,
) -> Float[Array, "1 m d"]:
  """Interpolates a table of positions, row major, to another grid.

  Args:
    table: one row for each cell of `grid`.
    grid: rows and columns of the table.
    new: rows and columns wanted.
    resize: one of `RESIZES`. "bicubic": torch's, without antialiasing (ViT,
      DeiT, CLIP and SigLIP in `transformers`); "bicubic_antialias": timm and
      DINOv2 with registers; "bilinear_antialias": SigLIP 2 with native aspect
      ratio.

  Returns:
    The table of `new`, in the table's dtype; computed in float32.
  """
  if tuple(grid) == tuple(new):
    return table
  width = table.shape[-1]
  image = table.reshape(*grid, width).astype(jnp.float32)
  if resize == "bicubic":
    rows, columns = (cubic(a, b) for a, b in zip(grid, new, strict=True))
    image = jnp.einsum("yi,xj,ijd->yxd", rows, columns, image)
  else:
    method = {"bicubic_antialias": "bicubic", "bilinear_antialias": "linear"}
    image = jax.image.resize(
      image, (*new, width), method[resize], antialias=True
    )
  return image.reshape(1, -1, width).astype(table.dtype)


@functools.cache
def cubic(size: int, new: int) -> np.ndarray:
  """Weights `[new, size]` of torch's bicubic resize along one axis.

  Pixel centres are mapped (`align_corners=False`), four taps are read, and
  taps beyond the edge read the edge.
  """
  where = (np.arange(new) + 0.5) * (size / new) - 0.5
  first = np.floor(where).astype(int)
  weights = np.zeros((new, size), np.float64)
  for tap in range(-1, 3):
    source = np.clip(first + tap, 0, size - 1)
    weight = _keys(np.abs(where - (first + tap)), TORCH_CUBIC)
    np.add.at(weights, (np.arange(new), source), weight)
  return weights.astype(np.float32)


def _keys(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel at distances 0 <= x < 2."""
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, far)
