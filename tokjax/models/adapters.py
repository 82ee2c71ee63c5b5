"""Low-rank updates of frozen projections."""

from typing import Any

import flax.linen as nn


class LowRank(nn.Module):
  """LoRA: a trainable update of low rank that starts at zero."""

  width: int
  rank: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    dense = lambda size, name, init: nn.Dense(
      size, use_bias=False, dtype=self.dtype, kernel_init=init, name=name
    )
    # Kaiming's with a = sqrt(5), as PyTorch initialises linear layers.
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    down = dense(self.rank, "down", init)(x)
    return dense(self.width, "up", nn.initializers.zeros)(down)
