"""A layout as an image."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.layout.types import BlockLayout


def picture(
  layout: BlockLayout, shape: tuple[int, int] | None = None
) -> Float32[Array, "*lead l rows columns"]:
  """Block map as grey values: 0 hidden, 0.5 partial, 1 full.

  Args:
    layout: BlockLayout.
    shape: `(rows, columns)` of the image, by default one pixel per block;
      smaller images average, larger ones interpolate.

  Returns:
    float32 `[*lead, L, rows, columns]`, query blocks downwards.
  """
  image = layout.kinds().astype(jnp.float32) / 2
  if shape is None:
    return image
  return jax.image.resize(image, image.shape[:-2] + tuple(shape), "linear")
