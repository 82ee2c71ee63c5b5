"""Prefill and decode with the full cache are the plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import FAMILIES, config, decoder, params_of, tokens
from tokjax.models import generation

# Prompts of two lengths, padded to 12, and tokens after them.
LENGTHS, PADDED, STEPS = np.array([11, 6]), 12, 2


def run(model, params, text, chunk):
  """Logits of a plain pass, and of prefill and decode with the same text."""
  plain, _ = jax.jit(model.apply)({"params": params}, text)
  length = jnp.asarray(LENGTHS)
  # What stands in padding must not matter.
  prompt = jnp.where(
    jnp.arange(PADDED)[None] < length[:, None], text[:, :PADDED], 7
  )
  going = generation.prefill(model, params, prompt, length, STEPS, chunk)
  out = [going.logits]
  for _ in range(STEPS):
    token = jax.vmap(lambda row, i: row[i])(text, going.position)
    going = generation.decode_step(model, params, going, token)
    out.append(going.logits)
  return plain, jnp.stack(out, axis=1)


@pytest.mark.parametrize(
  "family, chunk, whole",
  [(name, None, False) for name in FAMILIES]
  + [("gemma3", 4, False), ("gemma3", 4, True), ("llama3", None, True)],
)
def test_decoding_equals_the_plain_pass(family, chunk, whole):
  """As programs of blocks, and as part of one compilation."""
  model = decoder(**FAMILIES[family])
  params = params_of(config(**FAMILIES[family]))
  text = jnp.asarray(tokens(2, PADDED + STEPS + 1))
  do = jax.jit(run, static_argnums=(0, 3)) if whole else run
  plain, decoded = do(model, params, text, chunk)
  for row, length in enumerate(LENGTHS):
    meant = np.asarray(plain)[row, length - 1 : length + STEPS]
    assert meant.std() > 0.1
    np.testing.assert_allclose(decoded[row], meant, atol=2e-5, rtol=0)
