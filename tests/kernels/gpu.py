"""What the tests of simulated GPU kernels share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

HAS_SIMULATOR = hasattr(plgpu, "InterpretGPUParams")
# It came with JAX 0.11.2.
simulated = pytest.mark.skipif(
  not HAS_SIMULATOR,
  reason=f"JAX {jax.__version__} cannot simulate GPU kernels; 0.11.2 can",
)


def rounded(x, dtype=jnp.bfloat16):
  """float32 values that a dtype has."""
  return np.asarray(jnp.asarray(x, dtype), np.float32)
