"""Prefill and decode with the full cache are the plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import FAMILIES, config, decoder, params_of, tokens
from tokjax.models import prefill as prompting

# Prompts of two lengths, padded to 12, and tokens after them.
LENGTHS, PADDED, STEPS = np.array([11, 6]), 12, 2


def run(model, params, text, chunk):
  """Logits of a plain pass, and of prefill and decode with the same text."""
  plain, _ = model.apply({"params": params}, text)
  length = jnp.asarray(LENGTHS)
  # What stands in padding must not matter.
  prompt = jnp.where(
    jnp.arange(PADDED)[None] < length[:, None], text[:, :PADDED], 7
  )
  done = prompting.prefill(model, params, prompt, length, STEPS, chunk)
  out, states, position = [done.logits], done.states, done.position
  for _ in range(STEPS):
    token = jax.vmap(lambda row, i: row[i])(text, position)
    logits, states = model.apply(
      {"params": params},
      token,
      position,
      jnp.ones(2, bool),
      states,
      method="decode",
    )
    out.append(logits)
    position = position + 1
  return plain, jnp.stack(out, axis=1)


@pytest.mark.parametrize(
  "family, chunk", [(name, None) for name in FAMILIES] + [("gemma3", 4)]
)
def test_decoding_equals_the_plain_pass(family, chunk):
  model = decoder(**FAMILIES[family])
  params = params_of(config(**FAMILIES[family]))
  text = tokens(2, PADDED + STEPS + 1)
  plain, decoded = jax.jit(run, static_argnums=(0, 3))(
    model, params, text, chunk
  )
  for row, length in enumerate(LENGTHS):
    meant = np.asarray(plain)[row, length - 1 : length + STEPS]
    assert meant.std() > 0.1
    np.testing.assert_allclose(decoded[row], meant, atol=2e-5, rtol=0)
