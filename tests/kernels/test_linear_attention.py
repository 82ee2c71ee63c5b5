"""Linear attention against its recurrence, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, choice, linear_attention
from pallas_kernels.linear_attention import operands as forms
from pallas_kernels.linear_attention import tpu_plan

every_implementation = pytest.mark.parametrize(
  "implementation", ["tpu_interpret", "xla", "reference"]
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


def exact_gradients(q, k, v, log_decay, initial_state, scale, d_out, d_last):
  """Back through the recurrence, one token after the other."""
  wide = (q, k, v, initial_state, d_out, d_last)
  q, k, v, state, g, d_state = (np.array(x, np.float64) for x in wide)
  groups, times = k.shape[2], q.shape[2] // k.shape[2]
  k, v, g = np.repeat(k, times, 2), np.repeat(v, times, 2), scale * g
  factor = np.exp(np.asarray(log_decay, np.float64))[:, None, None]
  states = [state]
  for t in range(q.shape[1]):
    new = np.einsum("bhd,bhe->bhde", k[:, t], v[:, t])
    states.append(factor * states[-1] + new)
  d_q, d_k, d_v = (np.zeros_like(x) for x in (q, k, v))
  d_decay = np.zeros(np.shape(log_decay))
  for t in reversed(range(q.shape[1])):
    d_state += np.einsum("bhd,bhe->bhde", q[:, t], g[:, t])
    d_q[:, t] = np.einsum("bhde,bhe->bhd", states[t + 1], g[:, t])
    d_k[:, t] = np.einsum("bhde,bhe->bhd", d_state, v[:, t])
    d_v[:, t] = np.einsum("bhde,bhd->bhe", d_state, k[:, t])
    d_state *= factor
    d_decay += np.einsum("bhde,bhde->h", d_state, states[t])
  shared = lambda x: x.reshape(x.shape[:2] + (groups, times, -1)).sum(3)
  return {
    "q": d_q, "k": shared(d_k), "v": shared(d_v), "log_decay": d_decay,
    "initial_state": d_state,
  }  # fmt: skip


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


def check(values, implementation, tolerance=3e-6, **options):
  """Results and every gradient, relative to the largest of each kind."""
  expected = recurrence(**values, scale=0.3)
  rng = np.random.default_rng(1)
  # As bfloat16 holds them, so that either dtype is given the same.
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
  cotangents = [rounded(rng.normal(size=x.shape)) for x in expected]

  @jax.jit
  def both(values, cotangents):
    run = functools.partial(
      linear_attention,
      scale=0.3,
      return_state=True,
      implementation=implementation,
      **options,
    )
    results, pullback = jax.vjp(lambda x: run(**x), values)
    cotangents = [
      x.astype(y.dtype) for x, y in zip(cotangents, results, strict=True)
    ]
    return results, pullback(tuple(cotangents))[0]

  found, gradients = both(values, cotangents)
  exact = exact_gradients(
    **values, scale=0.3, d_out=cotangents[0], d_last=cotangents[1]
  )
  pairs = {n: (gradients[n], x) for n, x in exact.items()}
  pairs |= {n: (found[n], x) for n, x in enumerate(expected)}
  for name, (a, b) in pairs.items():
    error = np.max(np.abs(np.asarray(a, np.float64) - b))
    assert error < tolerance * np.max(np.abs(b)), name
  # Head by head: a gradient that is small compared with others must hold, too.
  np.testing.assert_allclose(
    gradients["log_decay"], exact["log_decay"], rtol=10 * tolerance, atol=1e-20
  )
  return gradients


@every_implementation
def test_gradients_are_those_of_the_recurrence(implementation):
  check(setting(), implementation, block=16)


def test_exact_gradients_follow_finite_differences():
  """Of the recurrence itself, so that one may be trusted with the others."""
  values = setting()
  rng = np.random.default_rng(1)
  weights = [rng.normal(size=x.shape) for x in recurrence(**values, scale=0.3)]

  def total(values):
    results = recurrence(**values, scale=0.3)
    return sum((a * w).sum() for a, w in zip(results, weights, strict=True))

  found = exact_gradients(
    **values, scale=0.3, d_out=weights[0], d_last=weights[1]
  )
  wide = {n: y.astype(np.float64) for n, y in values.items()}
  for name, x in wide.items():
    step = 1e-5 * rng.normal(size=x.shape)
    change = total(wide | {name: x + step}) - total(wide | {name: x - step})
    slope = np.sum(found[name] * step)
    assert slope == pytest.approx(change / 2, rel=1e-6)


@pytest.mark.parametrize(
  ("n", "block"),
  # Cells of two tiles: the ragged tile alone in the last one, or after a full
  # tile; no ragged tile. A tile as long as two others.
  [(300, 128), (450, 100), (512, 128), (600, 256)],
)
def test_simulated_kernels_walk_cells_without_races(
  n, block, races, monkeypatch
):
  monkeypatch.setattr(tpu_plan, "CELL_TOKENS", 256)
  values = setting(n) | {"log_decay": -np.float32([0, 0.002, 0.05, 30])}
  check(values, "tpu_races", block=block)
  assert not races()


@pytest.mark.parametrize(
  ("precision", "tolerance"), [(None, 1e-2), ("highest", 4e-3)]
)
def test_simulated_kernels_take_bfloat16(precision, tolerance, monkeypatch):
  """States and sums are float32; so are all factors, if that is asked for."""
  monkeypatch.setattr(tpu_plan, "CELL_TOKENS", 128)
  values = setting(200)
  values |= {n: jnp.asarray(values[n], jnp.bfloat16) for n in "qkv"}
  gradients = check(
    values, "tpu_interpret", tolerance=tolerance, precision=precision
  )
  dtypes = {n: str(x.dtype) for n, x in gradients.items()}
  assert dtypes == {n: str(x.dtype) for n, x in values.items()}


@pytest.mark.parametrize("implementation", ["tpu_interpret", "xla"])
def test_pieces_chain_and_vmap_is_a_loop(implementation):
  values = setting(48)
  plain = functools.partial(
    linear_attention, block=16, implementation=implementation
  )
  run = jax.jit(functools.partial(plain, return_state=True))
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

  def slopes(fn):
    total = lambda *x: jnp.sum(fn(*x) ** 2)
    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

  batched, looped = slopes(plain), slopes(jax.vmap(plain))
  for a, b in zip(looped, batched, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


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


def test_it_says_what_the_kernels_cannot_run():
  def call(dtype, *, heads=4, width=64, name="tpu_interpret", **options):
    q = jax.ShapeDtypeStruct((1, 256, heads, width), dtype)
    k = jax.ShapeDtypeStruct((1, 256, 1, width), dtype)
    run = functools.partial(linear_attention, implementation=name, **options)
    return jax.eval_shape(run, q, k, k)

  assert call(jnp.bfloat16).shape == (1, 256, 4, 64)
  with pytest.raises(NotImplementedError, match="platform is 'cpu'"):
    call(jnp.bfloat16, name="tpu")
  with pytest.raises(NotImplementedError, match="float16.*bfloat16 or float32"):
    call(jnp.float16)
  with pytest.raises(NotImplementedError, match="precision is .high.*highest"):
    call(jnp.float32, precision="high")
  with pytest.raises(NotImplementedError, match="48 query heads.*MiB of VMEM"):
    call(jnp.bfloat16, heads=48, width=256)
  with pytest.raises(NotImplementedError, match="tiles of 2048.*MiB of VMEM"):
    tall = jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.float32)
    run = functools.partial(
      linear_attention, implementation="tpu_interpret", block=2048
    )
    jax.eval_shape(run, tall, tall, tall)
  with pytest.raises(ValueError, match="'gpu_interpret', 'xla', 'reference'"):
    call(jnp.float32, name="fast")


def test_the_platform_decides_what_is_picked():
  known = choice.implementations("pallas_kernels.linear_attention")
  q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
  half = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.float16)
  pick = lambda q: (
    choice.choose(
      known, (forms.Operands(q, q, q, None, None), forms.Params(1.0, 128))
    ).name
  )
  assert pick(q) == "xla"
  with aot.compiling_for("tpu"):
    assert pick(q) == "tpu"
    assert pick(half) == "xla"
