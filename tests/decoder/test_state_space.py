"""The state-space model: the scan, texts in parts and in batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.case import draw_params
from tokjax.models.state_space import (
  StateSpace,
  StateSpaceConfig,
  rates,
  selective_scan,
)

CONFIG = StateSpaceConfig(
  vocabulary=13, width=8, depth=2, heads=2, head_dim=4, state=3, chunk=4
)
LENGTHS = (11, 6, 1)


def test_the_scan_is_the_recurrence():
  rng = np.random.default_rng(0)
  t, h, p, n = 11, 2, 3, 4
  x, b, c = (rng.normal(size=s) for s in ((t, h, p), (t, n), (t, n)))
  delta = np.abs(rng.normal(size=(t, h)))
  rate, state = -np.abs(rng.normal(size=h)), rng.normal(size=(h, p, n))
  given = [jnp.asarray(y, jnp.float32) for y in (x, delta, rate, b, c, state)]
  for chunk in (1, 4, 64):
    got = jax.jit(selective_scan, static_argnums=6)(*given, chunk)
    s, want = state.copy(), np.zeros((t, h, p))
    for i in range(t):
      for head in range(h):
        s[head] = np.exp(delta[i, head] * rate[head]) * s[head] + delta[
          i, head
        ] * np.outer(x[i, head], b[i])
        want[i, head] = s[head] @ c[i]
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], s, rtol=1e-4, atol=1e-5)


def text():
  token = np.random.default_rng(1).integers(0, 13, (3, 11))
  valid = np.arange(11)[None] < np.array(LENGTHS)[:, None]
  return jnp.asarray(token), jnp.asarray(valid)


@functools.cache
def drawn():
  """Random parameters."""
  token, _ = text()
  shapes = jax.eval_shape(StateSpace(CONFIG).init, jax.random.key(0), token)
  return draw_params(shapes["params"])


def test_a_ragged_batch_equals_one_by_one():
  token, valid = text()
  run = jax.jit(StateSpace(CONFIG).apply)
  logits, _ = run({"params": drawn()}, token, valid)
  for i, n in enumerate(LENGTHS):
    alone, _ = run({"params": drawn()}, token[i : i + 1, :n])
    np.testing.assert_allclose(logits[i, :n], alone[0], rtol=1e-4, atol=1e-5)


def test_a_text_in_parts_is_the_text():
  params = drawn()
  token, valid = text()
  run = jax.jit(StateSpace(CONFIG).apply)
  whole, out = run({"params": params}, token, valid)
  first, half = run({"params": params}, token[:, :5], valid[:, :5])
  rest, end = run(
    {"params": params}, token[:, 5:], valid[:, 5:], states=half.states
  )
  parts = jnp.concatenate([first, rest], axis=1)
  for i, n in enumerate(LENGTHS):
    np.testing.assert_allclose(parts[i, :n], whole[i, :n], rtol=1e-4, atol=1e-5)
  for a, b in zip(
    jax.tree.leaves(end.states), jax.tree.leaves(out.states), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_and_rates_are_those_of_blocks():
  params = drawn()
  token, valid = text()

  def loss(params):
    logits, out = StateSpace(CONFIG).apply({"params": params}, token, valid)
    return jnp.square(jnp.where(valid[..., None], logits, 0.0)).mean()

  slope = jax.jit(jax.grad(loss))(params)
  for path, x in jax.tree.leaves_with_path(slope):
    assert np.isfinite(x).all(), path
    assert np.abs(x).max() > 0, path
  np.testing.assert_allclose(
    rates(params)[1], -np.exp(params["block_1"]["log_rate"])
  )


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="heads=0: must be 1 or more"):
    StateSpaceConfig(vocabulary=3, heads=0)
  token, _ = text()
  model = StateSpace(CONFIG)
  with pytest.raises(ValueError, match="states: 1 given, must be .* 2 blocks"):
    jax.eval_shape(
      functools.partial(model.init, states=model.start(3)[:1]),
      jax.random.key(0), token,
    )  # fmt: skip
