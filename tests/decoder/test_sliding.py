"""Sliding layers over several windows equal `transformers`, and stay small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.language_references import make, torch
from tokjax import interop
from tokjax.models import generation
from tokjax.models.decoder_block import cache_of

# All have a window of 4: a prompt of several windows, and one within the first.
LENGTHS, PADDED, STEPS, WINDOW = np.array([11, 3]), 11, 10, 4


def run(model, params, text):
  """Logits of the prompts' last tokens and of those after them, and bytes."""
  length = jnp.asarray(LENGTHS)
  start = generation.prefill(model, params, text[:, :PADDED], length, STEPS)

  def step(going, _):
    token = jax.vmap(lambda row, i: row[i])(text, going.position)
    going = generation.decode_step(model, params, going, token)
    return going, going.logits

  going, after = jax.lax.scan(step, start, length=STEPS)
  cache = cache_of(model.slots)
  logical = [
    cache.bytes(layer, state).logical
    for layer, state in zip(model.layers, going.states, strict=True)
  ]
  logits = jnp.stack([start.logits, *after], axis=1)
  return logits, going.states, jnp.stack(logical)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_decoding_equals_the_reference(name, tmp_path):
  theirs = make(name)
  theirs.save_pretrained(tmp_path)
  model, params, _ = interop.load(tmp_path)
  text = np.random.default_rng(1).integers(3, 50, (2, PADDED + STEPS))
  text = text.astype(np.int32)
  ours, states, logical = jax.jit(run, static_argnums=0)(model, params, text)
  for row, n in enumerate(LENGTHS):
    with torch.no_grad():
      whole = torch.tensor(text[row : row + 1, : n + STEPS]).long()
      expected = theirs(whole).logits.numpy()[0, n - 1 :]
    assert np.abs(ours[row] - expected).max() < 2e-5
  cache = cache_of(model.slots)
  assert {layer.window for layer in model.layers} <= {None, WINDOW}
  for layer, state, counted in zip(model.layers, states, logical, strict=True):
    held = PADDED + STEPS if layer.window is None else WINDOW
    # Keys, values and a position of each head's entries.
    entry = layer.kv_heads * (2 * layer.head_dim + 1) * 4
    count = 2 * layer.kv_heads * 4 + 2 * 2 * 4
    said = cache.bytes(layer, state)
    assert said.physical == 2 * entry * held + count
    texts = LENGTHS + STEPS if layer.window is None else held
    np.testing.assert_array_equal(counted, entry * texts * np.ones(2))
