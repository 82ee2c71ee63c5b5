"""Sampling against a plain reading of the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import Sampler

LOGITS = np.log(np.array([0.05, 0.4, 0.02, 0.3, 0.13, 0.1], np.float32))


def allowed(temperature, top_k, top_p):
  """The tokens left, by sorting."""
  p = np.exp(LOGITS / temperature)
  order = np.argsort(-p)[: top_k or None]
  share = p[order] / p[order].sum()
  count = int(np.argmax(np.cumsum(share) >= top_p - 1e-6)) + 1
  return set(order[:count].tolist())


@pytest.mark.parametrize(
  "options",
  [
    dict(temperature=1.0, top_k=None, top_p=1.0),
    dict(temperature=1.0, top_k=3, top_p=1.0),
    dict(temperature=1.0, top_k=None, top_p=0.69),
    dict(temperature=0.5, top_k=4, top_p=0.8),
    dict(temperature=1.0, top_k=1, top_p=0.1),
    dict(temperature=1.0, top_k=99, top_p=0.9),
  ],
)
def test_draws_what_is_allowed_as_often_as_it_is_probable(options):
  sampler, keys = Sampler(**options), jax.random.split(jax.random.key(0), 4000)
  draw = jax.jit(lambda x, keys: jax.vmap(lambda k: sampler(x, k))(keys))
  drawn = np.asarray(draw(jnp.asarray(LOGITS), keys))
  left = sorted(allowed(**options))
  assert set(drawn.tolist()) == set(left)
  p = np.exp(LOGITS / options["temperature"])[left]
  often = np.array([(drawn == token).mean() for token in left])
  np.testing.assert_allclose(often, p / p.sum(), atol=0.03)


def test_greedy_needs_no_key_and_others_do():
  assert int(Sampler()(jnp.asarray(LOGITS))) == 1
  with pytest.raises(ValueError, match="pass key="):
    Sampler(temperature=1.0)(jnp.asarray(LOGITS))


@pytest.mark.parametrize(
  "options",
  [
    dict(temperature=-1.0),
    dict(temperature=float("nan")),
    dict(temperature=float("inf")),
    dict(top_k=0),
    dict(top_p=0.0),
    dict(top_p=float("nan")),
  ],
)
def test_bad_options_are_named(options):
  (name,) = options
  with pytest.raises(ValueError, match=name):
    Sampler(**options)
