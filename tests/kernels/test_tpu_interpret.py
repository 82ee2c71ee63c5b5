"""The TPU kernels in Pallas's simulator, copies and races included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic import primitives
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts
from pallas_kernels.block_sparse_attention import registry, tpu
from tests.kernels import oracle
from tests.kernels.cases import (
  LARGE_LOCAL,
  elements,
  inputs,
  large,
  mask_and_layout,
)
from tests.kernels.test_block_sparse_attention import attend, close

CASES = (
  # Two query heads share keys and lists, and so a cell; lists of all examples.
  large(
    "packed",
    batch=2,
    heads=4,
    groups=2,
    mask=LARGE_LOCAL,
    numbers="hidden",
    bias=True,
    sinks=True,
    soft_cap=2.0,
  ),
  # Two query heads share keys but not lists: two turns of a key block. The
  # first block of queries sees nothing at all.
  large("turns", q_len=384, k_len=200, groups=1, mask="random", bias=True),
  # Full blocks two at a time, one left over, one ragged; 200 values a head.
  large(
    "wide",
    q_len=130,
    k_len=1100,
    heads=1,
    groups=1,
    mask=layouts.Full(),
    v_width=200,
  ),
  large("tags", q_len=256, k_len=256, heads=1, groups=1, mask="union"),
  large(
    "segments",
    batch=2,
    q_len=256,
    k_len=256,
    heads=1,
    groups=1,
    mask="segments",
    bias=True,
  ),
)


@pytest.fixture
def races(monkeypatch):
  """Lets "tpu_races" be named; returns whether a race was seen."""
  known = dict(registry.implementations())
  known["tpu_races"] = tpu.interpreted(detect_races=True)
  monkeypatch.setattr(registry, "implementations", lambda: known)
  pltpu.reset_tpu_interpret_mode_state()
  yield lambda: interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


def check(case, mask, layout):
  """Compares output and gradients with the formulas in float64."""
  arrays = inputs(case)
  rng = np.random.default_rng(1)
  d_out = rng.normal(size=arrays["q"].shape[:3] + (case.v_width,))
  options = {
    "bias": arrays.get("bias"),
    "sinks": arrays.get("sinks"),
    "soft_cap": case.soft_cap,
  }
  out, lse = oracle.attention(
    arrays["q"], arrays["k"], arrays["v"], mask, **options
  )
  d_lse = np.where(np.isneginf(lse), 0, rng.normal(size=lse.shape))

  @jax.jit
  def both(arrays, d_out, d_lse):
    result, pullback = jax.vjp(attend(case, layout, "tpu_races"), arrays)
    return result, pullback((d_out, d_lse))[0]

  found, gradients = both(
    arrays, d_out.astype(np.float32), d_lse.astype(np.float32)
  )
  close(found[0], out)
  close(found[1], lse)
  expected = oracle.gradients(
    arrays["q"], arrays["k"], arrays["v"], mask, d_out, d_lse, **options
  )
  for name, gradient in gradients.items():
    close(gradient, expected[name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_simulated_kernels_follow_the_formulas_without_races(case, races):
  check(case, *mask_and_layout(case))
  assert not races()


def test_the_mask_function_of_packed_heads_knows_the_head(races):
  """One list for two heads whose mask functions differ."""
  case = large("one list", q_len=128, k_len=256, groups=1)
  fn = layouts.PerHead((layouts.Causal(), layouts.Window(9, 40)))
  none, both = np.zeros((1, 1), np.int32), np.full((1, 1), 2, np.int32)
  lists = np.array([[[1, 0]]], np.int32)
  layout = layouts.BlockLayout(
    none, lists, both, lists, none[0], q_len=128, k_len=256, mask_fn=fn
  )
  arrays = inputs(case)
  out, _ = jax.jit(attend(case, layout, "tpu_races"))(arrays)
  close(
    out,
    oracle.attention(arrays["q"], arrays["k"], arrays["v"], elements(fn, case))[
      0
    ],
  )
  assert not races()


def test_a_race_would_be_seen(monkeypatch, races):
  """Reading what was copied without waiting for it."""
  known = registry.implementations()
  known["tpu_races"] = tpu.interpreted(
    detect_races=True, dma_execution_mode="eager"
  )
  monkeypatch.setattr(primitives.AsyncCopyDescriptor, "wait", lambda _: None)
  case = large("race", q_len=128, k_len=128, heads=1, groups=1)
  layout = mask_and_layout(case)[1]
  run = jax.jit(attend(case, layout, "tpu_races"))
  # Newer simulators raise at once.
  try:
    jax.block_until_ready(run(inputs(case)))
  except jax.errors.JaxRuntimeError as error:
    assert "RACE DETECTED" in str(error)
  else:
    assert races()


def test_it_says_what_it_cannot_run():
  shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
  q, half = shape(1, 256, 2, 64), shape(1, 256, 2, 64, dtype=jnp.float16)
  fine = layouts.full(q_len=256)

  def call(q, layout, name="tpu_interpret", **options):
    return jax.eval_shape(
      lambda q: block_sparse_attention(
        q, q, q, layout, implementation=name, **options
      ),
      q,
    )

  assert call(q, fine).shape == q.shape
  with pytest.raises(NotImplementedError, match="platform is 'cpu'"):
    call(q, fine, "tpu")
  with pytest.raises(NotImplementedError, match="block_k is 64.*128"):
    call(q, layouts.full(q_len=256, block_k=64))
  with pytest.raises(NotImplementedError, match="float16.*bfloat16 or float32"):
    call(half, fine)
  with pytest.raises(NotImplementedError, match="precision is .high.*highest"):
    call(q, fine, precision="high")
  wide = layouts.full(q_len=8192, block_q=8192, block_k=8192)
  with pytest.raises(NotImplementedError, match="MiB of VMEM.*smaller blocks"):
    call(shape(1, 8192, 1, 256), wide)


def test_numbers_outside_the_lists_do_no_harm():
  """Block numbers beyond the keys, past the count, are never followed."""
  case = large("outside", heads=1, groups=1, mask=layouts.Causal(100))
  arrays = inputs(case)
  _, layout = mask_and_layout(case)
  wild = dataclasses.replace(
    layout,
    **{
      name: jnp.where(
        np.arange(getattr(layout, name).shape[-1])
        < np.asarray(getattr(layout, name.replace("index", "count")))[
          ..., None
        ],
        getattr(layout, name),
        10**6,
      )
      for name in ("full_index", "partial_index")
    },
  )
  run = jax.jit(lambda layout: attend(case, layout, "tpu_interpret")(arrays))
  jax.tree.map(np.testing.assert_array_equal, run(layout), run(wild))
