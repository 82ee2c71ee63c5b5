"""Keys that are rotated to places which are known while tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.attention import core
from tokjax.layer import Layer
from tokjax.models.rotary import Rotary

ROTARIES = {
  "plain": Rotary(100.0),
  "dynamic": Rotary(100.0, "dynamic", 2.0, 8),
  "llama3": Rotary(100.0, "llama3", 4.0, 16),
  "yarn": Rotary(100.0, "yarn", 4.0, 16, 1.0, 32.0),
}


@pytest.mark.parametrize("name", ROTARIES)
def test_tables_of_known_positions_are_those_of_traced_ones(name):
  rotary, place = ROTARIES[name], np.arange(40)[None]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, 40, 3, 8)), "f4")
  known = jax.jit(lambda x: rotary(x, place))(x)
  traced = jax.jit(rotary)(x, jnp.asarray(place))
  np.testing.assert_allclose(known, traced, atol=2e-6)


def test_no_sine_is_computed_where_positions_are_known():
  x, place = jnp.ones((1, 9, 2, 8)), np.arange(9)[None]
  of = lambda position: str(
    jax.make_jaxpr(lambda x: ROTARIES["plain"](x, position))(x)
  )
  assert " sin " not in of(place)
  assert " sin " in of(jnp.asarray(place))


def test_a_program_holds_tables_once_however_many_layers_use_them():
  x, place = jnp.ones((1, 512, 2, 8)), np.arange(512)[None]

  def size(layers):
    def run(x):
      for _ in range(layers):
        x = ROTARIES["plain"](x, place)
      return x

    return len(jax.jit(run).lower(x).as_text())

  assert size(8) < 1.2 * size(1)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", [*ROTARIES, None])
def test_products_rotate_keys_on_their_way(name, queries):
  layer = Layer(
    heads=4, kv_heads=2, head_dim=8, soft_cap=3.0, rotary=ROTARIES.get(name)
  )
  rng = np.random.default_rng(1)
  q, k = (
    jnp.asarray(rng.normal(size=(n, heads, 8)), "f4")
    for n, heads in ((queries, 4), (40, 2))
  )
  place = np.arange(40)[::-1]
  turned = layer.rotate(k[None], jnp.asarray(place)[None])[0]
  expected = core.logits_of_example(layer, q, turned)
  found = core.logits_of_example(layer, q, k, place)
  np.testing.assert_allclose(found, expected, atol=5e-6)
  if name:
    plain = core.logits_of_example(layer, q, k)
    assert abs(plain - found).max() > 0.1
