"""The GELU and the resizes, against float64 and against torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models.activations import ACTIVATIONS, gelu
from tokjax.models.positions import RESIZES, resize_table

erf = np.vectorize(math.erf)


def exact_gelu(x):
  x = np.asarray(x, np.float64)
  return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def test_gelu_is_exact():
  x = np.linspace(-12, 12, 20001, dtype=np.float32)
  assert np.abs(np.asarray(jax.jit(gelu)(x)) - exact_gelu(x)).max() < 1.2e-6


def test_gelu_gradient():
  x = np.linspace(-6, 6, 2001, dtype=np.float32)
  slope = jax.vmap(jax.grad(gelu))(x)
  z = np.asarray(x, np.float64)
  density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
  expected = 0.5 * (1 + erf(z / math.sqrt(2))) + z * density
  np.testing.assert_allclose(slope, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bfloat16_is_rounded_once(name):
  x = jnp.linspace(-8, 8, 4001).astype(jnp.bfloat16)
  function = ACTIVATIONS[name]
  full = np.asarray(jax.jit(function)(x.astype(jnp.float32)))
  half = jax.jit(function)(x)
  assert half.dtype == jnp.bfloat16
  bound = 2.0**-7 * np.abs(full) + 1e-4
  assert (np.abs(np.asarray(half, np.float32) - full) <= bound).all()


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("new", [(7, 7), (3, 9), (10, 12), (1, 2)])
def test_resizes_equal_torch(resize, new):
  torch = pytest.importorskip("torch", reason="the reference is torch's")
  rng = np.random.default_rng(0)
  table = rng.normal(size=(1, 35, 6)).astype(np.float32)
  image = torch.tensor(table).reshape(1, 5, 7, 6).permute(0, 3, 1, 2)
  mode, _, antialias = resize.partition("_")
  expected = torch.nn.functional.interpolate(
    image, new, mode=mode, antialias=bool(antialias), align_corners=False
  )
  expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
  ours = jax.jit(resize_table, static_argnums=(1, 2, 3))(
    table, (5, 7), new, resize
  )
  np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_resize_to_the_same_grid_changes_nothing():
  table = jnp.arange(24.0).reshape(1, 12, 2)
  for resize in RESIZES:
    assert resize_table(table, (3, 4), (3, 4), resize) is table
