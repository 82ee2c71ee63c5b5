"""The GPU kernels in Pallas's simulator, copies, barriers and races included.

The simulator came with JAX 0.11.2; with an older one all but the first tests
skip.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts
from pallas_kernels.walks import gpu_stream
from tests.kernels import oracle
from tests.kernels.cases import LARGE as CASES
from tests.kernels.cases import inputs, mask_and_layout, wide
from tests.kernels.gpu import HAS_SIMULATOR, rounded, simulated
from tests.kernels.test_block_sparse_attention import attend, close


def test_it_says_what_it_cannot_run():
  shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
  q, fine = shape(1, 256, 2, 64), layouts.full(q_len=256)

  def reason(q, layout=fine, name="gpu_interpret"):
    with pytest.raises(NotImplementedError) as error:
      jax.eval_shape(
        lambda q: block_sparse_attention(q, q, q, layout, implementation=name),
        q,
      )
    return str(error.value)

  assert "platform is 'cpu'" in reason(q, name="gpu")
  if not HAS_SIMULATOR:
    assert "0.11.2 and newer can" in reason(q)
    return
  short = layouts.full(q_len=256, block_k=32)
  assert "block_k is 32, the GPU kernels need a multiple of 64" in reason(
    q, short
  )
  full = shape(1, 256, 2, 64, dtype=jnp.float32)
  assert "float32, the GPU kernels take bfloat16 or float16" in reason(full)
  assert "head size 320" in reason(shape(1, 256, 2, 320))


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_simulated_kernels_follow_the_formulas_without_races(case, gpu_races):
  mask, layout = mask_and_layout(case)
  arrays = inputs(case, jnp.bfloat16)
  exact = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
  rng = np.random.default_rng(1)
  d_out = rounded(rng.normal(size=exact["q"].shape[:3] + (case.v_width,)))
  options = {
    "bias": exact.get("bias"),
    "sinks": exact.get("sinks"),
    "soft_cap": case.soft_cap,
  }
  qkv = [exact[name] for name in "qkv"]
  out, lse = oracle.attention(*qkv, mask, **options)
  d_lse = np.where(np.isneginf(lse), 0, rng.normal(size=lse.shape))

  @jax.jit
  def both(arrays, d_out, d_lse):
    result, pullback = jax.vjp(attend(case, layout, "gpu_races"), arrays)
    return result, pullback((d_out, d_lse))[0]

  found, gradients = both(
    arrays, jnp.asarray(d_out, jnp.bfloat16), d_lse.astype(np.float32)
  )
  close(found[0], out, jnp.bfloat16)
  close(found[1], lse)
  expected = oracle.gradients(*qkv, mask, d_out, d_lse, **options)
  for name, gradient in gradients.items():
    close(gradient, expected[name], jnp.bfloat16)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["wait", "free"])
def test_a_race_would_be_seen(forgotten, monkeypatch, gpu_races):
  """Multiplying before a copy has arrived; copying while it is multiplied.

  Which threads are first decides how the simulator sees that nobody waits: a
  race, or a copy that arrives at a barrier where the last one was not seen.
  """
  seen = {"free": "RACE DETECTED"}
  seen["wait"] = "RACE DETECTED|no threads observed phase"
  case = wide("race", q_len=128, k_len=1280, heads=1, groups=1)
  case = dataclasses.replace(case, mask=layouts.Full())
  wait = plgpu.barrier_wait
  if forgotten == "wait":
    monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
  else:
    fill = gpu_stream.Ring.fill

    def without_waiting(ring, at, start, position):
      monkeypatch.setattr(plgpu, "barrier_wait", lambda barrier: None)
      fill(ring, at, start, position)
      monkeypatch.setattr(plgpu, "barrier_wait", wait)

    monkeypatch.setattr(gpu_stream.Ring, "fill", without_waiting)
  layout = mask_and_layout(case)[1]
  call = jax.jit(attend(case, layout, "gpu_races"))
  with pytest.raises(Exception, match=seen[forgotten]):
    jax.block_until_ready(call(inputs(case, jnp.bfloat16)))


@simulated
@pytest.mark.slow
def test_numbers_outside_the_lists_do_no_harm(gpu_races):
  """Block numbers beyond the keys, past the count, are never followed."""
  case = wide("outside", heads=1, groups=1, mask=layouts.Causal(100))
  arrays = inputs(case, jnp.bfloat16)
  _, layout = mask_and_layout(case)
  wild = {}
  for name in ("full", "partial"):
    index = np.asarray(getattr(layout, f"{name}_index"))
    count = np.asarray(getattr(layout, f"{name}_count"))
    inside = np.arange(index.shape[-1]) < count[..., None]
    wild[f"{name}_index"] = np.where(inside, index, 10**6).astype(np.int32)
  wild = dataclasses.replace(layout, **wild)
  run = jax.jit(lambda layout: attend(case, layout, "gpu_races")(arrays))
  jax.tree.map(np.testing.assert_array_equal, run(layout), run(wild))
