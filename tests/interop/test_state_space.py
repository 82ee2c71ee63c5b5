"""The state-space model next to Mamba-2 of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.test_state_space import CONFIG, LENGTHS, text
from tokjax.models.state_space import StateSpace

torch = pytest.importorskip(
  "torch", reason="parity is measured where torch is installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured where transformers is installed"
)


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
