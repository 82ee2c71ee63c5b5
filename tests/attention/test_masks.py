"""Masks of any form: a text is the same wherever its padding stands.

Below and above the length from which prompts go through the block-sparse
kernels (`core.LONG`), which cut them into blocks by place.
"""

import jax
import numpy as np
import pytest

from pallas_kernels import layout as layouts
from tests.decoder import models
from tokjax import budgets
from tokjax.attention import core
from tokjax.attention.causal import Causal
from tokjax.attention.estimated import Antidiagonal, VerticalSlash
from tokjax.attention.linear import Linear
from tokjax.attention.static import Band
from tokjax.layer import Layer
from tokjax.slots import Slots

ATTENDS = {
  "causal": Causal(),
  "band": Band(first=4, budget=budgets.Count(100)),
  "vertical_slash": VerticalSlash(
    budgets.Count(40), budgets.Count(200), block=64
  ),
  "antidiagonal": Antidiagonal(0.5),
  "linear": Linear(),
}


def masks(n: int) -> np.ndarray:
  """Left padding, padding at both ends, and holes; equally many real tokens."""
  real = n - 150
  left, both, holes = np.zeros((3, n), bool)
  left[-real:] = True
  both[9 : 9 + real] = True
  places = np.random.default_rng(n).permutation(n)[:real]
  holes[places] = True
  return np.stack([left, both, holes])


@pytest.mark.parametrize(
  "name, n", [("causal", core.LONG - 1), *((x, core.LONG) for x in ATTENDS)]
)
def test_padding_may_stand_anywhere(name, n):
  slots = Slots(attend=ATTENDS[name])
  # The second layer has a window, whose distances padding must not stretch.
  layers = ("full",) if name == "linear" else ("full", "sliding")
  model = models.decoder(
    slots, depth=len(layers), layers=layers, window=37, length=2048
  )
  params = models.params_of(model.config, slots)
  mask = masks(n)
  text = models.tokens(1, int(mask[0].sum()))
  padded = np.full(mask.shape, 7, text.dtype)
  for row, real in zip(padded, mask, strict=True):
    row[real] = text[0]
  logits = jax.jit(lambda t, m: model.apply({"params": params}, t, mask=m)[0])
  alone = jax.jit(lambda t: model.apply({"params": params}, t)[0])(text)[0]
  for got, real in zip(logits(padded, mask), mask, strict=True):
    np.testing.assert_allclose(got[real], alone, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
  ("window", "size"),
  [(None, 512), (1, 128), (2, 128), (511, 128), (512, 256), (1024, 512)],
)
def test_blocks_are_half_of_a_window_at_most(window, size):
  layer = Layer(heads=2, kv_heads=1, head_dim=8, window=window)
  assert core.block_size(layer, layouts.Causal()) == size
  assert core.block_size(layer, layouts.Full()) == 128
