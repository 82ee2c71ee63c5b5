"""Block-sparse attention for NVIDIA Hopper GPUs, by Pallas on Mosaic GPU.

`implementation="gpu"` runs on an H100 or H200 (or is compiled for one ahead of
time, see `pallas_kernels.aot.gpu`); "gpu_interpret" runs the same kernels on a
CPU in Pallas's GPU interpreter, which simulates copies and barriers. It is
slow, meant for tests, and needs JAX 0.11.2 or newer.

Block sizes are multiples of 64; the kernels use the chip best with 128, and
with 64 where two query heads share keys and lists. Head sizes are padded to
multiples of 64.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import aot
from pallas_kernels.block_sparse_attention import (
  gpu_backward,
  gpu_forward,
  gpu_plan,
)
from pallas_kernels.walks import contract, int32

_DTYPES = ("bfloat16", "float16")
# The simulator, which JAX before 0.11.2 has not.
_SIMULATOR = getattr(plgpu, "InterpretGPUParams", None)


def supports(operands, params):
  """See `contract`: the reason against these operands, or None."""
  del params
  layout = operands.layout
  for name in ("block_q", "block_k"):
    size = getattr(layout, name)
    if size % gpu_plan.ROWS:
      return (
        f"the layout's {name} is {size}, the GPU kernels need a multiple "
        f"of {gpu_plan.ROWS}"
      )
  if str(operands.q.dtype) not in _DTYPES:
    return (
      f"q, k, v are {operands.q.dtype}, the GPU kernels take "
      f"{' or '.join(_DTYPES)}"
    )
  for name, x in (("q and k", operands.q), ("v", operands.v)):
    if x.shape[-1] > gpu_plan.MAX_HEAD_SIZE:
      return (
        f"{name} have head size {x.shape[-1]}, the GPU kernels take at most "
        f"{gpu_plan.MAX_HEAD_SIZE}"
      )
  return None


def _supports_here(operands, params):
  platform = aot.platform()
  if platform != "gpu":
    return (
      f"the platform is {platform!r}, and the GPU kernels run on 'gpu'; "
      "implementation='gpu_interpret' simulates them elsewhere"
    )
  if jax.default_backend() == "gpu":
    chip = str(getattr(jax.local_devices()[0], "compute_capability", "none"))
    if chip != "9.0":
      return (
        f"the GPU has compute capability {chip}, the GPU kernels need 9.0 "
        "(Hopper: H100, H200)"
      )
  return supports(operands, params)


def _supports_interpreted(operands, params):
  if _SIMULATOR is None:
    return (
      f"JAX {jax.__version__} cannot simulate GPU kernels; 0.11.2 and newer can"
    )
  return supports(operands, params)


@functools.cache
def interpreted(**options):
  """The implementation that simulates the kernels on CPU.

  Args:
    **options: of `plgpu.InterpretGPUParams`, for example `detect_races=True`.
  """

  def simulate(fn):
    def call(*args):
      return fn(*args, interpret=_SIMULATOR(**options))

    return int32.traced(call)

  return contract.Implementation(
    "gpu_interpret",
    simulate(gpu_forward.forward),
    simulate(gpu_backward.backward),
    _supports_interpreted,
    needs_transpose=True,
  )


IMPLEMENTATIONS = (
  contract.Implementation(
    "gpu",
    int32.traced(gpu_forward.forward),
    int32.traced(gpu_backward.backward),
    _supports_here,
    platforms=("gpu",),
    needs_transpose=True,
  ),
  interpreted(),
)
