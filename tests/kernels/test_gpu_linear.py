"""The GPU kernel of linear attention in Pallas's simulator, races included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, linear_attention
from pallas_kernels.linear_attention import gpu, gpu_kernel
from tests.kernels.gpu import simulated
from tests.kernels.test_linear_attention import check, setting


def test_lists_name_the_blocks_of_a_cell():
  order = functools.partial(gpu_kernel.Order, 5 * 128 - 3, 256)
  ahead, back = (order(reverse=reverse).lists() for reverse in (False, True))
  for layout, counts in ((ahead, [0, 1, 0, 1, 0]), (back, [1, 0, 1, 0, 0])):
    np.testing.assert_array_equal(layout.full_count[0, 0], counts)
    np.testing.assert_array_equal(layout.partial_index[0, 0, :, 0], range(5))
  np.testing.assert_array_equal(ahead.full_index[0, 0, [1, 3], 0], [0, 2])
  np.testing.assert_array_equal(back.full_index[0, 0, [0, 2], 0], [1, 3])


@simulated
@pytest.mark.slow
def test_results_and_gradients_are_those_of_the_recurrence(
  monkeypatch, gpu_races
):
  """A cell of two blocks, and one that is ragged."""
  monkeypatch.setattr(gpu, "_CELL", 256)
  values = setting(300) | {"log_decay": -np.float32([0, 0.002, 0.05, 30])}
  values |= {name: jnp.asarray(values[name], jnp.bfloat16) for name in "qkv"}
  check(values, "gpu_races", tolerance=1e-2)


@simulated
@pytest.mark.slow
def test_bad_tokens_reach_later_ones_alone(gpu_races):
  values = setting(140)
  values |= {name: jnp.asarray(values[name], jnp.bfloat16) for name in "qkv"}
  run = jax.jit(functools.partial(linear_attention, implementation="gpu_races"))
  right = np.asarray(run(**values), np.float32)
  found = run(**values | {"v": values["v"].at[:, 70, 1].set(jnp.nan)})
  found = np.asarray(found, np.float32)
  np.testing.assert_array_equal(found[:, :70], right[:, :70])
  np.testing.assert_array_equal(found[:, :, :2], right[:, :, :2])
  assert np.isnan(found[:, 70:, 2:]).all()


def test_it_says_what_it_cannot_run():
  def reason(width=64, dtype=jnp.bfloat16, precision=None):
    q = jax.ShapeDtypeStruct((1, 256, 2, width), dtype)
    call = functools.partial(
      linear_attention, precision=precision, implementation="gpu"
    )
    with aot.compiling_for("gpu"), pytest.raises(NotImplementedError) as error:
      jax.eval_shape(lambda q: call(q, q, q), q)
    return str(error.value)

  assert "takes at most 128" in reason(width=192)
  assert "float32, the GPU kernels take" in reason(dtype=jnp.float32)
  assert "rounds decayed products" in reason(precision="highest")
