"""The state-space model next to transformers, in parts and in batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

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


@functools.cache
def official():
  """A model of transformers and its parameters as ours."""
  torch.manual_seed(0)
  model = transformers.Mamba2ForCausalLM(
    transformers.Mamba2Config(
      vocab_size=13, hidden_size=8, num_hidden_layers=2, num_heads=2,
      head_dim=4, state_size=3, expand=1, n_groups=1, conv_kernel=4,
      chunk_size=4, tie_word_embeddings=True,
    )
  ).eval()  # fmt: skip
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.2 * torch.randn_like(p))
  w = {k: jnp.asarray(v.numpy()) for k, v in model.state_dict().items()}
  params = {
    "embed": {"embedding": w["backbone.embeddings.weight"]},
    "norm": w["backbone.norm_f.weight"],
  }
  for i in range(2):
    of = lambda name, i=i: w[f"backbone.layers.{i}.{name}"]
    params[f"block_{i}"] = {
      "norm": of("norm.weight"),
      "in_proj": {"kernel": of("mixer.in_proj.weight").T},
      "conv": of("mixer.conv1d.weight")[:, 0].T,
      "conv_bias": of("mixer.conv1d.bias"),
      "delta_bias": of("mixer.dt_bias"),
      "log_rate": of("mixer.A_log"),
      "skip": of("mixer.D"),
      "gate_norm": of("mixer.norm.weight"),
      "out_proj": {"kernel": of("mixer.out_proj.weight").T},
    }
  return model, params


def text():
  token = np.random.default_rng(1).integers(0, 13, (3, 11))
  valid = np.arange(11)[None] < np.array(LENGTHS)[:, None]
  return jnp.asarray(token), jnp.asarray(valid)


def test_a_ragged_batch_equals_transformers_one_by_one():
  model, params = official()
  token, valid = text()
  shapes = jax.eval_shape(StateSpace(CONFIG).init, jax.random.key(0), token)
  assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(
    jnp.shape, params
  )
  run = jax.jit(StateSpace(CONFIG).apply)
  logits, _ = run({"params": params}, token, valid)
  for i, n in enumerate(LENGTHS):
    with torch.no_grad():
      want = model(torch.tensor(np.array(token[i : i + 1, :n]))).logits[0]
    np.testing.assert_allclose(logits[i, :n], want, rtol=2e-4, atol=2e-4)


def test_a_text_in_parts_is_the_text():
  _, params = official()
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
  _, params = official()
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
