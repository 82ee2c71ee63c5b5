"""Positions that depend on the length of a text: equal to recomputation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, params_of
from tokjax.models import Decoder, Generator, Rotary, generation

DYNAMIC = Rotary(100.0, "dynamic", 2.0, 12)
CONFIG = config(rotary=DYNAMIC)
TEXT = np.random.default_rng(0).integers(0, 40, 12)


def generator(model, **options):
  return Generator(model, params_of(model.config), **options)


@pytest.mark.parametrize("chunk", [None, 4])
def test_decoding_within_the_length_equals_the_whole_text(chunk):
  model = Decoder(CONFIG)
  maker = generator(model, capacity=8, decode=4, buckets=(8,), chunk=chunk)
  going = maker.prefill([TEXT[:8].tolist()])
  apply = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])
  whole = apply(maker.params, TEXT[None])[0]
  for i in range(8, 12):
    np.testing.assert_allclose(going.logits[0], whole[i - 1], atol=1e-5)
    token = jnp.asarray(TEXT[i : i + 1], jnp.int32)
    going = generation.decode_step(model, maker.params, going, token)


@pytest.mark.parametrize("chunk", [None, 4])
def test_texts_that_outgrow_the_length_are_refused(chunk):
  message = r"prompts of 8 tokens and 5 more.*original_length=12"
  with pytest.raises(ValueError, match=message):
    generator(Decoder(CONFIG), capacity=8, decode=5, chunk=chunk)
  with pytest.raises(ValueError, match=message):
    generation.prefill(
      Decoder(CONFIG), params_of(CONFIG), TEXT[None, :8], np.array([8]), 5
    )
  # Only layers that use them count, and rules that do not change do not.
  sliding = config(layers=("sliding",), window=4, local_rotary=DYNAMIC)
  with pytest.raises(ValueError, match="original_length=12"):
    sliding.check_generation(8, 5)
  config(local_rotary=DYNAMIC).check_generation(8, 5)
  config(rotary=Rotary(100.0, "yarn", 2.0, 12)).check_generation(8, 5)


def test_a_whole_text_may_be_longer():
  """Every row of a batch has the frequencies of its own length."""
  short = Decoder(config(rotary=Rotary(100.0, "dynamic", 2.0, 6)))
  params = params_of(short.config)
  apply = jax.jit(lambda p, t, m: short.apply({"params": p}, t, mask=m)[0])
  tokens = np.stack([TEXT, TEXT])
  mask = np.arange(12)[None] < np.array([[12], [9]])
  both = apply(params, tokens, mask)
  alone = apply(params, tokens[1:, :9], mask[1:, :9])
  np.testing.assert_allclose(both[1, :9], alone[0], atol=1e-5)
  assert np.abs(both[0, :9] - both[1, :9]).max() > 1e-3
