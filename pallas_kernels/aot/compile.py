"""Compiles a function for a device of another machine, and reports on it."""

import contextlib
from typing import NamedTuple

import jax
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  SingleDeviceSharding,
  use_abstract_mesh,
)

from pallas_kernels.aot import target

# Names of a platform in lowering; `jax.default_backend()` says "gpu".
_LOWERING = {"tpu": "tpu", "gpu": "cuda"}


class Report(NamedTuple):
  """What the compiler says about a program.

  Attributes:
    arguments, outputs, temporaries, code: bytes of device memory.
    flops, bytes_accessed, seconds: its cost analysis; kernels count with the
      cost estimate they give.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int
  flops: float
  bytes_accessed: float
  seconds: float


def compile_for(device, fn, *args, sharding=None):
  """Compiles `fn(*args)` for one device.

  Args:
    device: a device of a topology description, such as `aot.tpu.device("v5e")`.
    fn: a function that was not traced on this machine before (see `target`).
    *args: pytrees of arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes
      matter.
    sharding: of the arguments, by default all on the device.

  Returns:
    `jax.stages.Compiled`; it cannot run here.
  """
  sharding = sharding or SingleDeviceSharding(device)
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(target.compiling_for(device.platform))
    # Some lowering rules ask which chip it is.
    chip = AbstractDevice(
      device.device_kind, getattr(device, "num_cores", None), device.platform
    )
    stack.enter_context(
      use_abstract_mesh(AbstractMesh((), (), abstract_device=chip))
    )
    traced = jax.jit(fn).trace(*args)
    lowered = traced.lower(lowering_platforms=(_LOWERING[device.platform],))
  return lowered.compile()


def report(compiled):
  """Returns the `Report` of a compiled program; unknown numbers are 0."""
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
  return Report(
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.generated_code_size_in_bytes,
    costs.get("flops", 0.0),
    costs.get("bytes accessed", 0.0),
    costs.get("optimal_seconds", 0.0),
  )
