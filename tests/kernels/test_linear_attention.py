"""Linear attention against its recurrence, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_attention

every_implementation = pytest.mark.parametrize(
  "implementation", ["xla", "reference"]
)


def setting(n=37):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 2
  values = {"q": draw(2, n, 4, 8), "k": draw(2, n, 2, 8), "v": draw(2, n, 2, 6)}
  decay = -np.array([0, 0.05, 0.7, 30.0], np.float32)
  return values | {"log_decay": decay, "initial_state": draw(2, 4, 8, 6)}


def recurrence(q, k, v, log_decay, initial_state, scale):
  """One token after the other."""
  q, k, v, state = (np.asarray(x, np.float64) for x in (q, k, v, initial_state))
  k, v = np.repeat(k, 2, 2), np.repeat(v, 2, 2)
  factor = np.exp(np.asarray(log_decay, np.float64))[None, :, None, None]
  out = []
  for t in range(q.shape[1]):
    state = factor * state + np.einsum("bhd,bhe->bhde", k[:, t], v[:, t])
    out.append(scale * np.einsum("bhd,bhde->bhe", q[:, t], state))
  return np.stack(out, 1), state


@every_implementation
@pytest.mark.parametrize("n", [1, 16, 37])
def test_it_is_the_recurrence(n, implementation):
  values = setting(n)
  run = jax.jit(
    functools.partial(
      linear_attention,
      scale=0.3,
      block=16,
      return_state=True,
      implementation=implementation,
    )
  )
  found = run(**values)
  expected = recurrence(**values, scale=0.3)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@every_implementation
def test_gradients_follow_finite_differences_of_the_recurrence(implementation):
  values = setting()
  rng = np.random.default_rng(1)
  weights = [rng.normal(size=x.shape) for x in recurrence(**values, scale=0.3)]

  def total(fn, values):
    return sum(
      (a * w).sum() for a, w in zip(fn(**values), weights, strict=True)
    )

  run = functools.partial(
    linear_attention,
    scale=0.3,
    block=16,
    return_state=True,
    implementation=implementation,
  )
  found = jax.jit(jax.grad(lambda x: total(run, x)))(values)
  exact = functools.partial(recurrence, scale=0.3)
  for name, x in values.items():
    step = 1e-5 * rng.normal(size=x.shape)
    wide = {n: y.astype(np.float64) for n, y in values.items()}
    change = (
      total(exact, wide | {name: x + step})
      - total(exact, wide | {name: x - step})
    ) / 2
    slope = np.sum(np.asarray(found[name], np.float64) * step)
    assert slope == pytest.approx(change, rel=1e-3, abs=1e-8)


def test_pieces_chain_and_vmap_is_a_loop():
  values = setting(48)
  run = jax.jit(
    functools.partial(linear_attention, block=16, return_state=True)
  )
  whole, last = run(**values)
  state, parts = values.pop("initial_state"), []
  for cut in (slice(0, 20), slice(20, 48)):
    piece = {n: values[n][:, cut] for n in "qkv"}
    out, state = run(
      **piece, log_decay=values["log_decay"], initial_state=state
    )
    parts.append(out)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)
  np.testing.assert_allclose(state, last, atol=2e-5)
  q, k, v = (values[n] for n in "qkv")
  plain = functools.partial(linear_attention, block=16)
  batched, looped = jax.jit(lambda *x: (plain(*x), jax.vmap(plain)(*x)))(
    q, k, v
  )
  np.testing.assert_allclose(looped, batched, atol=1e-5)


def test_half_precision_and_wrong_calls():
  values = setting()
  q, k, v = (jnp.asarray(values[n], jnp.bfloat16) for n in "qkv")
  out, state = linear_attention(q, k, v, return_state=True)
  assert out.dtype == jnp.bfloat16
  assert state.dtype == jnp.float32
  with pytest.raises(ValueError, match="G dividing H"):
    linear_attention(q[:, :, :3], k, v)
  with pytest.raises(ValueError, match="initial_state has shape"):
    linear_attention(q, k, v, initial_state=jnp.zeros((2, 4, 8, 8)))
