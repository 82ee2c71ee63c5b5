"""Architectures that cannot be, and rotary positions by definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import recipes
from tokjax.models import Decoder, DecoderConfig, Rotary


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(depth=0), "depth=0"),
    (dict(width=10, heads=4, kv_heads=4), "multiple of heads=4"),
    (dict(head_dim=7), "must be even"),
    (dict(heads=4, kv_heads=3), "kv_heads=3"),
    (dict(layers=("sliding",)), "window=None"),
    (dict(layers=()), "layers="),
  ],
)
def test_bad_architectures_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    DecoderConfig(**changes)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(base=1.0), "base=1.0"),
    (dict(scaling="yarn", factor=2.0), "needs original_length"),
  ],
)
def test_bad_positions_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    Rotary(**options)


@pytest.mark.parametrize(
  "name, message",
  [
    ("tome", "'proportional', which a decoder .*it is for encoders"),
    ("sparsifiner", "'attend' for an encoder.*takes .*tokjax.slots.Attend"),
    ("downsample", "'program', which a decoder .*it is for encoders"),
  ],
)
def test_recipes_of_encoders_are_refused(name, message):
  with pytest.raises(ValueError, match=f"'{name}' fills {message}"):
    Decoder(DecoderConfig(), recipes.get(name))


def test_products_depend_on_distances_only():
  rotary = Rotary(100.0)
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 8)), jnp.float32) for _ in "qk")
  product = lambda a, b: float(
    (rotary(q, jnp.array([a])) * rotary(k, jnp.array([b]))).sum()
  )
  assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
  assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_a_pair_turns_by_its_frequency():
  x = jnp.asarray(np.eye(4)[None, :1], jnp.float32)  # feature 0 of pair (0, 2)
  turned = np.asarray(Rotary(16.0)(x, jnp.array([3])))[0, 0]
  np.testing.assert_allclose(turned, [np.cos(3), 0, np.sin(3), 0], atol=1e-6)
