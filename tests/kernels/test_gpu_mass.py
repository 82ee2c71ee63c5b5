"""The GPU kernels of the mass sums in Pallas's simulator, races included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import masses
from tests.kernels import oracle
from tests.kernels.cases import LARGE_LOCAL, mask_and_layout, wide
from tests.kernels.gpu import simulated
from tests.kernels.test_attention_mass import check_sums, setting

CASES = (
  # Heads that share keys, ragged ends, full and partial blocks.
  wide("local", groups=1, mask=LARGE_LOCAL, bias=True),
  # Pairs of heads, padded head sizes, stored masks.
  wide("pairs", q_len=70, k_len=130, groups=1, block_q=64, block_k=64, width=40,
       mask="random", bias=True, numbers="hidden"),
  wide("segments", batch=2, q_len=200, heads=1, k_len=200, groups=1,
       mask="segments", width=256),
  wide("nothing", heads=1, groups=1, mask="nothing"),
  # 66 blocks in a list: more than the steps whose sums are kept.
  wide("long", q_len=66 * 64, k_len=64, heads=1, groups=1, block_q=64,
       block_k=64, mask=layouts.Full()),
)  # fmt: skip


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sums_and_gradients_follow_the_formulas_without_races(case, gpu_races):
  arrays, _, _, _ = setting(case, jnp.bfloat16)
  mask, _ = mask_and_layout(case)
  lse = oracle.probabilities(
    arrays["q"], arrays["k"], mask, bias=arrays.get("bias")
  )["lse"]
  check_sums(case, "gpu_races", lse.astype(np.float32), jnp.bfloat16)


@simulated
@pytest.mark.slow
def test_a_cap_and_a_log_sum_exp_of_its_own(gpu_races):
  """Gradients through both passes, against the plain formula."""
  case = wide("capped", q_len=130, k_len=130, heads=2, groups=1)
  arrays, layout, weights, _ = setting(case, jnp.bfloat16)
  rng = np.random.default_rng(1)
  g = rng.normal(size=(1, 2, 130)), rng.normal(size=(1, 2, 2, 2))
  g = tuple(x.astype(np.float32) for x in g)

  def both(implementation, dtype):
    def sums(q, k, weights):
      return masses(
        q, k, layout=layout, weights=weights, soft_cap=2.0,
        implementation=implementation,
      )  # fmt: skip

    @jax.jit
    def run(q, k, weights):
      value, pullback = jax.vjp(sums, q, k, weights)
      return value, pullback(g)

    return run(*(jnp.asarray(arrays[n], dtype) for n in "qk"), weights)

  found, gradients = both("gpu_races", jnp.bfloat16)
  expected, exact = both("reference", jnp.float32)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4)
  for x, y in zip(gradients, exact, strict=True):
    size = float(jnp.abs(y).max())
    np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=2e-2 * size)
