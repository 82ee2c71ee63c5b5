"""Every operation gives the same results with `jax_enable_x64` as without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  attention_mass,
  block_sparse_attention,
  decode_attention,
  linear_attention,
)
from pallas_kernels import layout as layouts

N, WIDTH = 128, 128


def layout_of(ids):
  """Tagged partial blocks and segments, built inside of jit."""
  sizes = {"q_len": N, "block_q": 128, "block_k": 128}
  union = layouts.union(
    layouts.from_pattern(layouts.Causal() & layouts.Window(30), **sizes),
    layouts.from_pattern(layouts.Dilated(16), **sizes),
  )
  return layouts.intersect(union, layouts.from_segments(ids))


def block_sparse(x, implementation):
  bias = x[..., 0]
  return block_sparse_attention(
    x, x[:, :, :1], x[:, :, 1:], layout_of(jnp.arange(N)[None] // 50),
    bias=jnp.swapaxes(bias, 1, 2), implementation=implementation,
  )  # fmt: skip


def mass(x, implementation):
  layout = layouts.from_pattern(layouts.Causal(), q_len=N)
  return attention_mass(
    x, x[:, :, :1], layout=layout, implementation=implementation
  )


def linear(x, implementation):
  return linear_attention(
    x, x[:, :, :1], x[:, :, 1:], log_decay=jnp.float32(-0.1),
    implementation=implementation,
  )  # fmt: skip


def decode(x, implementation):
  blocks = jnp.zeros((1, 1, 1), int)
  return decode_attention(
    x[:, :1], x[:, :, :1], x[:, :, 1:], lengths=jnp.array([90]), blocks=blocks,
    implementation=implementation, splits=2,
  )  # fmt: skip


@pytest.mark.parametrize("implementation", ("xla", "tpu_interpret"))
@pytest.mark.parametrize("operation", (block_sparse, mass, linear, decode))
def test_results_are_those_without(operation, implementation):
  x = np.random.default_rng(0).normal(size=(1, N, 2, WIDTH))
  x = x.astype(np.float32)
  run = functools.partial(operation, implementation=implementation)
  if operation is not decode:
    run = jax.grad(lambda x, run=run: jnp.sum(run(x) ** 2))
  if implementation == "tpu_interpret":
    # Kernels are traced without x64; running them as well says nothing more.
    with jax.enable_x64(True):
      lowered = jax.jit(run).lower(x)
    assert lowered.out_info.dtype == jnp.float32
    return
  plain = jax.jit(run)(x)
  with jax.enable_x64(True):
    found = jax.jit(run)(x)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)
