"""Products of few rows are those of `lax.dot_general`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, params_of, tokens
from tokjax.models import Decoder, Generator, products


@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 1, 32), (2, 3, 32), (32,)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("own", [0, 1])
def test_padded_rows_change_nothing(shape, dtype, own):
  key = jax.random.key(0)
  x = jax.random.normal(key, shape, dtype)
  w = jax.random.normal(key, (32, 24) if own == 0 else (24, 32), dtype)
  dims = ((len(shape) - 1,), (own,)), ((), ())
  ours = products.dot_general(x, w, dims, preferred_element_type=jnp.float32)
  theirs = jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
  assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
  np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_model_in_bfloat16_has_logits_in_float32_near_those_in_float32():
  params = params_of(config())
  logits = []
  for dtype in (jnp.float32, jnp.bfloat16):
    model = Decoder(config(), dtype=dtype)
    weights = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
    made = Generator(model, weights, capacity=8, decode=2)
    going = made.prefill([tokens(1, 6)[0].tolist()])
    going = made.step(going, np.array([3], np.int32))
    assert going.logits.dtype == jnp.float32
    logits.append(np.asarray(going.logits))
  spread = logits[0].std()
  assert 0 < np.abs(logits[1] - logits[0]).max() < 0.1 * spread
