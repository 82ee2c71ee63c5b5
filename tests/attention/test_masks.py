"""Masks of any form: a text is the same wherever its padding stands.

Below and above the length from which prompts go through the block-sparse
kernels (`core.LONG`), which cut them into blocks by place.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout as layouts
from tests.decoder import models
from tokjax import budgets
from tokjax.attention import causal, core
from tokjax.attention.causal import Causal
from tokjax.attention.estimated import Antidiagonal, VerticalSlash
from tokjax.attention.linear import Linear
from tokjax.attention.per_head import PerHead
from tokjax.attention.sentinel import Sentinels
from tokjax.attention.static import Band, Separators
from tokjax.layer import Arrivals, Layer, Memory
from tokjax.models.rotary import Rotary
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


SHOWN = {
  "share": Band(first=4, budget=budgets.Share(0.25)),
  "reindexed": Band(first=4, budget=budgets.Share(0.25), reindexed=True),
  "tri_shape": Band(first=4, budget=budgets.Count(40), dense=9),
  "separators": Separators(tokens=(1, 2), window=budgets.Share(0.1)),
  "sentinels": Sentinels(tokens=(1, 2)),
  "per_head": PerHead(
    (Band(first=4, budget=budgets.Share(0.2)), Causal()),
    ((0, 1, 1, 0),),
  ),
}


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("name", SHOWN)
def test_masks_that_depend_on_the_prompt_are_listed(name, window, monkeypatch):
  """By rows and by blocks; two texts, one of which is shorter."""
  attend, n = SHOWN[name], 300
  layer = Layer(
    heads=4, kv_heads=2, head_dim=8, window=window, rotary=Rotary(100.0)
  )
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.normal(size=(2, n, heads, 8)), "f4")
  real = jnp.arange(n)[None] < jnp.array([[n], [171]])
  position = jnp.broadcast_to(jnp.arange(n), (2, n))
  token = jnp.asarray(rng.integers(0, 20, (2, n)))
  a = Arrivals(draw(4), draw(2), draw(2), position, real, token=token)

  def run_of(a):
    return attend(layer, a, Memory.of(a), params={}, carry={})[0]

  def run(long):
    monkeypatch.setattr(core, "LONG", long)
    return np.where(real[:, :, None, None], jax.jit(run_of)(a), 0)

  heads = 4 if name == "per_head" else 1
  monkeypatch.setattr(causal, "MASK", 2 * heads * n * n)
  listed = run(256)
  np.testing.assert_allclose(listed, run(1024), atol=2e-5)
  layout = attend.layout(layer, a.clean(), Memory.of(a))
  assert layout is not None and (layout.density() < 0.9).all()
  # Gradients compute the mask anew instead of keeping it.
  loss = lambda q: run_of(dataclasses.replace(a, q=q)).sum()
  monkeypatch.setattr(core, "LONG", 256)
  kept = jax.eval_shape(lambda q: jax.vjp(loss, q)[1], a.q)
  assert not [x for x in jax.tree.leaves(kept) if x.size >= n * n]
  # Masks of longer prompts are not held.
  monkeypatch.setattr(causal, "MASK", 2 * heads * n * n - 1)
  assert attend.layout(layer, a.clean(), Memory.of(a)) is None


@pytest.mark.parametrize(
  ("window", "size"),
  [(None, 512), (1, 128), (2, 128), (511, 128), (512, 256), (1024, 512)],
)
def test_blocks_are_half_of_a_window_at_most(window, size):
  layer = Layer(heads=2, kv_heads=1, head_dim=8, window=window)
  assert core.block_size(layer, layouts.Causal()) == size
  assert core.block_size(layer, layouts.Full()) == 128
