"""Costs: loops counted in full, parts that add up, peaks never guessed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import recipes
from tokjax.analysis import cost
from tokjax.models import ViT, ViTConfig

SIDE = 64
PRODUCT = 2 * SIDE**3
MATRIX = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)


def product(c, _=None):
  return c @ c, None


def rounds(n, unroll=1):
  def run(x):
    return jax.lax.scan(product, x, None, length=n, unroll=unroll)[0]

  return run


def products(measured: cost.Cost) -> float:
  return measured.flops / PRODUCT


@pytest.mark.parametrize("jitted", [False, True])
def test_a_product_counts_two_operations_a_term(jitted):
  function = jnp.matmul if not jitted else jax.jit(jnp.matmul)
  measured = cost.measure(function, MATRIX, MATRIX)
  assert measured.flops == PRODUCT
  # Two operands are read, one result is written; nothing else is needed.
  assert measured.bytes == 3 * SIDE**2 * 4
  assert measured.peak_memory >= 3 * SIDE**2 * 4
  assert measured.exact


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_a_loop_counts_every_round(n):
  measured = cost.measure(rounds(n), MATRIX)
  np.testing.assert_allclose(products(measured), n, rtol=1e-3, atol=1e-3)
  assert measured.exact


@pytest.mark.parametrize("unroll", [5, 12, 20])
def test_an_unrolled_loop_counts_every_round(unroll):
  measured = cost.measure(rounds(12, unroll), MATRIX)
  np.testing.assert_allclose(products(measured), 12, rtol=1e-3)


def test_nested_loops_multiply():
  def outer(x):
    def step(_, c):
      return jax.lax.cond(c[0, 0] > 0, rounds(3), lambda c: c + 1, c)

    return jax.lax.fori_loop(0, 4, step, x)

  measured = cost.measure(outer, MATRIX)
  np.testing.assert_allclose(products(measured), 12, rtol=5e-3)


def test_a_vmapped_loop_counts_every_example():
  batch = jax.ShapeDtypeStruct((3, SIDE, SIDE), jnp.float32)
  measured = cost.measure(jax.vmap(rounds(5)), batch)
  np.testing.assert_allclose(products(measured), 15, rtol=1e-3)


def test_a_loop_that_data_ends_is_a_lower_bound():
  def run(x, n):
    return jax.lax.fori_loop(0, n, lambda _, c: c @ c, x)

  measured = cost.measure(run, MATRIX, jax.ShapeDtypeStruct((), jnp.int32))
  assert not measured.exact
  np.testing.assert_allclose(products(measured), 1, rtol=1e-3)


def test_a_compiled_program_is_not_compiled_again():
  function = jax.jit(rounds(7))
  compiled = function.lower(MATRIX).compile()
  assert cost.measure(function, MATRIX, compiled=compiled) == cost.measure(
    function, MATRIX
  )


CONFIG = ViTConfig(
  image_size=32,
  patch_size=4,
  width=64,
  depth=3,
  heads=2,
  mlp_dim=256,
  num_classes=5,
)


def forward(recipe, keep):
  model = ViT(CONFIG, recipes.get(recipe, keep=keep))
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)
  return lambda params, images: model.apply(params, images)[0], params, images


# One plain, one with a loop in its matching.
@pytest.mark.parametrize("recipe", ["none", "atc"])
def test_blocks_add_up_to_the_whole(recipe):
  program = forward(recipe, 0.5)
  whole = cost.measure(*program)
  parts = cost.by_block(*program)
  assert list(parts) == ["block_0", "block_1", "block_2", "rest"]
  total = sum(parts.values(), cost.Cost())
  np.testing.assert_allclose(total.flops, whole.flops, rtol=0.01)
  np.testing.assert_allclose(total.bytes, whole.bytes, rtol=0.1)
  assert 0 < total.peak_memory <= whole.peak_memory
  assert total.exact
  assert whole.exact


def test_blocks_of_a_plain_model_cost_the_same_and_what_they_must():
  parts = cost.by_block(*forward("none", 1.0))
  assert parts["block_0"] == parts["block_1"] == parts["block_2"]
  b, n, d = 2, 65, CONFIG.width
  products = 2 * b * n * d * (4 * d + 2 * n + 2 * CONFIG.mlp_dim)
  # Norms, softmax and activation come on top: some per cent at this width.
  assert products < parts["block_0"].flops < 1.15 * products


def test_later_blocks_of_a_reduced_model_cost_less():
  parts = cost.by_block(*forward("tome", 0.5))
  flops = [parts[f"block_{i}"].flops for i in range(3)]
  assert flops[0] > flops[1] > flops[2]


def test_scope_may_name_other_parts():
  parts = cost.by_block(
    *forward("none", 1.0), scope=r"/(mlp|attention)(?:/|\.)"
  )
  assert set(parts) == {"mlp", "attention", "rest"}
  assert parts["mlp"].flops > parts["attention"].flops


def test_mfu_is_known_for_known_devices_only():
  assert cost.mfu(275e12, 2.0, "TPU v4") == 0.5
  assert cost.mfu(1.0, 1.0, "TPU v99") is None
  assert cost.mfu(1.0, 1.0) is None, "the CPU's peak is not in the table"


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("TPU v5", 459e12),
    ("TPU v5 lite", 197e12),
    # Not another device whose name begins with these letters, and no part.
    ("NVIDIA A10G", None),
    ("NVIDIA L40S", None),
    ("NVIDIA H100", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
  ],
)
def test_peaks_are_those_of_the_named_device(kind, peak):
  assert cost.peak_flops(kind) == peak


def test_mfu_rejects_a_time_that_cannot_be():
  with pytest.raises(ValueError, match="seconds=0.0"):
    cost.mfu(1.0, 0.0)
