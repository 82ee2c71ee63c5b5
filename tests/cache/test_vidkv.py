"""VidKV: bytes that are really there, codes by hand, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import recipes
from tokjax.cache import quantisation as few
from tokjax.cache.entries import Entries
from tokjax.cache.vidkv import VidKV, fourier
from tokjax.layer import Layer


@pytest.mark.parametrize("bits", [1.0, 1.25, 1.5, 2.0])
def test_keys_take_the_bits_they_are_said_to(bits):
  n, heads, d = 96, 3, 64
  layer = Layer(heads=heads, kv_heads=heads, head_dim=d)

  def made():
    k = jnp.zeros((1, heads, n, d))
    place = jnp.zeros((1, heads, n), jnp.int32)
    whole = Entries(k, k, place, jnp.full((1, heads), n))
    return vars(VidKV(bits).pack(layer, whole, n).codes)

  arrays = jax.eval_shape(made)
  bytes_of = lambda x: x.size * x.dtype.itemsize
  size = lambda *names: sum(bytes_of(arrays[name]) for name in names)
  assert size("k_bits", "k_signs") * 8 == bits * n * heads * d
  assert size("v_codes") == 13 * n * heads  # 64 ternary codes in 13 bytes.
  # A scale for 32 tokens, and a lowest value where codes have two bits.
  scales = size("k_low", "k_step", "k_scale")
  assert scales == n // 32 * bits * heads * d * 4
  assert size("v_scale") == n // 32 * heads * d * 4


def test_codes_by_hand():
  codes, scale = few.ternary(jnp.asarray([4.0, -4.0, 0.1, 0.0]), 0)
  assert codes.tolist() == [2, 0, 1, 1]
  np.testing.assert_allclose(scale, [2.025])
  codes, scale = few.signs(jnp.asarray([1.0, -1.0, 0.0, -2.0]), 0)
  assert (codes.tolist(), scale.tolist()) == ([1, 0, 1, 0], [1.0])


def test_ternary_codes_are_packed_by_fives():
  codes = np.random.default_rng(0).integers(0, 3, (4, 13)).astype(np.uint8)
  packed = few.pack_ternary(jnp.asarray(codes))
  assert packed.shape == (4, 3)
  assert packed.dtype == np.uint8
  np.testing.assert_array_equal(few.unpack_ternary(packed, 13), codes)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_the_transform_is_that_of_fourier(d):
  forth, back = fourier(d)
  np.testing.assert_allclose(forth @ back, np.eye(d), atol=1e-6)
  x = np.random.default_rng(0).normal(size=d)
  full = np.fft.fft(x)
  parts = np.concatenate([full.real, full.imag])
  for value in x @ forth:
    assert np.abs(parts - value).min() < 1e-5


def test_options_are_refused():
  with pytest.raises(ValueError, match="bits=2.5: must lie in"):
    recipes.get("vidkv", bits=2.5)
  with pytest.raises(ValueError, match="buffer=100, group=32"):
    recipes.get("vidkv", buffer=100)
  with pytest.raises(ValueError, match="bits=1.1: gives none of 8 channels"):
    VidKV(1.1).check(Layer(head_dim=8))
