"""What the tests of several kernels share."""

import importlib

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import choice
from pallas_kernels.attention_mass import tpu as mass
from pallas_kernels.decode_attention import tpu as decode
from pallas_kernels.linear_attention import tpu as linear


@pytest.fixture
def races(monkeypatch):
  """Lets "tpu_races" be named; returns whether a race was seen."""
  known = choice.implementations
  made = {
    "pallas_kernels.attention_mass": mass.interpreted(detect_races=True),
    "pallas_kernels.decode_attention": decode.interpreted(detect_races=True),
    # Two cores share the parallel part of the grid, as on a v5p: were a state
    # on its way from cell to cell in it, results would be wrong.
    "pallas_kernels.linear_attention": linear.interpreted(
      detect_races=True, num_cores_or_threads=2
    ),
  }

  def implementations(package):
    found = dict(known(package))
    if package in made:
      found["tpu_races"] = made[package]
    return found

  monkeypatch.setattr(choice, "implementations", implementations)
  pltpu.reset_tpu_interpret_mode_state()
  yield lambda: interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


_ON_GPU = (
  "attention_mass",
  "block_sparse_attention",
  "decode_attention",
  "linear_attention",
)


@pytest.fixture
def gpu_races(monkeypatch):
  """Lets "gpu_races" be named; a race raises."""
  known, made = choice.implementations, {}
  for name in _ON_GPU:
    package = f"pallas_kernels.{name}"
    module = importlib.import_module(f"{package}.gpu")
    made[package] = module.interpreted(detect_races=True)

  def implementations(package):
    found = dict(known(package))
    if package in made:
      found["gpu_races"] = made[package]
    return found

  monkeypatch.setattr(choice, "implementations", implementations)
  # Its place in JAX is private, and there is none in older ones.
  module = "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
  reset = importlib.import_module(module).reset_gpu_interpret_mode_state
  reset()
  yield
  reset()
