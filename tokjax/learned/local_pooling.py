"""Token-aware average pooling before attention (TAP)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokjax.attention import dense


class TokenAwarePooling(nn.Module):
  """Dense attention on tokens that each mix their surroundings as they learn.

  Branch 0 is the token, branch i the mean of a 3 x 3 window with dilation i
  (zeros outside the grid, always divided by 9); weights are a softmax over
  branches, from two convolutions on the grid (Guo et al., 2023; checked
  against TAPADL_FAN/models/tap_fan.py). Protected tokens are left as they are.
  Deviation: the statistics of the norm between the convolutions are those of
  a channel in one image instead of the batch (BatchNorm), so that the module
  has no state and no example depends on its neighbours.

  Attributes:
    branches: K.
  """

  branches: int = 4

  complete = True
  # Every block pools neighbours in the image.
  gridded = True

  def __post_init__(self):
    if self.branches < 1:
      raise ValueError(f"branches={self.branches}: must be 1 or more")
    super().__post_init__()

  def setup(self):
    conv = lambda: nn.Conv(self.branches, (3, 3), use_bias=False)
    self.first, self.second = conv(), conv()
    self.norm = nn.GroupNorm(num_groups=None, group_size=1, epsilon=1e-5)

  def __call__(self, q, k, v, **where):
    return dense.Dense()(q, k, v, **where)

  def inputs(
    self,
    x: Float[Array, "b n d"],
    protected: int,
    grid: tuple[int, int] | None,
  ) -> Float[Array, "b n d"]:
    """What attention sees instead of `x`."""
    if grid is None:
      raise ValueError("TokenAwarePooling: needs the complete grid of tokens")
    b, _, width = x.shape
    patches = x[:, protected:].reshape(b, *grid, width)
    weight = self.second(self.norm(self.first(patches)))
    weight = jax.nn.softmax(weight, axis=-1).astype(x.dtype)
    mixed = patches * weight[..., :1]
    for i in range(1, self.branches):
      mixed = mixed + window_mean(patches, i) * weight[..., i : i + 1]
    mixed = mixed.reshape(b, -1, width)
    return jnp.concatenate([x[:, :protected], mixed], axis=1)


def window_mean(
  x: Float[Array, "b h w d"], dilation: int
) -> Float[Array, "b h w d"]:
  """Mean of a dilated 3 x 3 window; what lies outside counts as zero."""
  total = jax.lax.reduce_window(
    x,
    np.zeros((), x.dtype),  # a constant, or it has no gradient under jit
    jax.lax.add,
    window_dimensions=(1, 3, 3, 1),
    window_strides=(1, 1, 1, 1),
    padding=((0, 0), (dilation, dilation), (dilation, dilation), (0, 0)),
    window_dilation=(1, dilation, dilation, 1),
  )
  return total / 9
