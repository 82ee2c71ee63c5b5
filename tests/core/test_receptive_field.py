"""LongMamba's thresholds next to plain loops, and what they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import receptive_field as field
from tokjax.models.state_space import Filter, StateSpace, StateSpaceConfig

T, HEADS = 40, 3


def steps(seed=0, texts=2):
  rng = np.random.default_rng(seed)
  return np.exp(rng.normal(size=(texts, T, HEADS)) - 3).astype(np.float32)


def by_hand(delta, length, share):
  """Clipped deltas of one head, and its threshold, as the official code."""
  top = max(1, int(len(delta) * share))
  delta = np.minimum(delta, sorted(delta)[-top])
  if length <= len(delta):
    return delta, 0.0
  ordered, long = sorted(delta, reverse=True), []
  for i in range(length):
    at = max((i + 0.5) * len(delta) / length - 0.5, 0)
    low = int(at)
    high = min(low + 1, len(delta) - 1)
    long.append(ordered[low] * (1 - at + low) + ordered[high] * (at - low))
  total = 0.0
  for i, value in enumerate(long):
    total += value
    if total > delta.sum():
      return delta, long[i + 1]
  raise AssertionError("no threshold")


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_calibration_is_that_of_the_official_loops(share):
  delta, rate = steps(), np.array([-0.1, -1.0, -3.0], np.float32)
  lengths = (20, 40, 60, 300)
  got = jax.jit(
    lambda d: field.calibrate(d, jnp.asarray(rate), lengths, share=share)
  )(delta)
  for h in range(HEADS):
    of = [by_hand(d[:, h], T, share)[0] for d in delta]
    want = np.mean([np.exp(rate[h] * x.sum()) for x in of])
    np.testing.assert_allclose(got.retained[h], want, rtol=1e-5)
    for i, n in enumerate(lengths):
      want = np.mean([by_hand(d[:, h], n, share)[1] for d in delta])
      np.testing.assert_allclose(got.threshold[i, h], want, rtol=1e-4)


def test_what_is_left_sums_to_what_training_had():
  rng = np.random.default_rng(0)
  delta = jnp.asarray(rng.uniform(size=(T, HEADS)), jnp.float32)
  long = jnp.tile(delta, (4, 1))
  c = field.calibrate(delta[None], -jnp.ones(HEADS), (T, 4 * T), share=1 / T)
  left = field.filtered(long, jnp.int32(4 * T), c, least=0.0).sum(axis=0)
  np.testing.assert_allclose(left, delta.sum(axis=0), rtol=0.2)


def test_only_long_texts_and_wide_heads_are_filtered():
  delta = jnp.asarray(steps(texts=1)[0])
  c = field.Calibration(
    jnp.asarray([0.9, 0.2, 0.5]), jnp.asarray([40, 80, 160]),
    jnp.asarray([[0.0] * 3, [0.05] * 3, [0.2] * 3]), jnp.int32(T),
  )  # fmt: skip
  run = jax.jit(lambda n, **more: field.filtered(delta, n, c, **more))
  np.testing.assert_array_equal(run(jnp.int32(40), least=0.1), delta)
  np.testing.assert_array_equal(run(jnp.int32(90), least=1.0), delta)
  got = run(jnp.int32(90), least=0.4)
  np.testing.assert_array_equal(got[:, 1], delta[:, 1])
  kept = np.where(np.asarray(delta) > 0.05, delta, 0)
  np.testing.assert_array_equal(got[:, ::2], kept[:, ::2])
  assert 0 < (kept == 0).mean() < 1
  half = run(jnp.int32(150), least=0.4, factor=0.5)
  kept = np.where(np.asarray(delta) > 0.1, delta, 0)
  np.testing.assert_array_equal(half[:, 0], kept[:, 0])


def test_a_model_skips_tokens_exactly_in_each_text_of_a_batch():
  config = StateSpaceConfig(5, width=8, depth=1, heads=2, head_dim=4, state=3)
  model, rng = StateSpace(config), np.random.default_rng(2)
  token = jnp.asarray(rng.integers(0, 5, (2, 12)))
  valid = jnp.arange(12)[None] < jnp.asarray([12, 7])[:, None]
  params = jax.jit(model.init)(jax.random.key(0), token)
  # A threshold that nothing passes for texts of ten tokens and more.
  c = field.Calibration(
    jnp.ones(2), jnp.asarray([6, 14]), jnp.asarray([[0.0] * 2, [9.0] * 2]),
    jnp.int32(6),
  )  # fmt: skip
  run = jax.jit(model.apply)
  _, out = run(params, token, valid, filters=(Filter(c, 0.5),))
  _, plain = run(params, token, valid)
  assert not np.any(out.states[0].ssm[0])
  np.testing.assert_allclose(
    out.states[0].ssm[1], plain.states[0].ssm[1], rtol=1e-6
  )
  assert (plain.delta > 0).all()
  np.testing.assert_array_equal(out.delta, plain.delta)


def test_bad_input_is_refused():
  delta, rate = jnp.asarray(steps()), -jnp.ones(HEADS)
  with pytest.raises(ValueError, match=r"share=0.0: must lie in \(0, 1\]"):
    field.calibrate(delta, rate, (80,), share=0.0)
  for lengths in ((), (80, 40)):
    with pytest.raises(ValueError, match="lengths=.* must be ascending"):
      field.calibrate(delta, rate, lengths)
  with pytest.raises(ValueError, match="length=0: must be 1 or more"):
    field.threshold(delta[0], 0)
