"""Block-sparse attention for NVIDIA Hopper GPUs, by Pallas on Mosaic GPU.

`implementation="gpu"` runs on an H100 or H200 (or is compiled for one ahead of
time, see `pallas_kernels.aot.gpu`); "gpu_interpret" runs the same kernels on a
CPU in Pallas's GPU interpreter, see `walks.gpu_targets`.

Block sizes are multiples of 64; the kernels use the chip best with 128, and
with 64 where two query heads share keys and lists. Head sizes are padded to
multiples of 64.
"""

from pallas_kernels.block_sparse_attention import gpu_backward, gpu_forward
from pallas_kernels.walks import gpu_targets


def supports(operands, params):
  """See `contract`: the reason against these operands, or None."""
  del params
  return gpu_targets.unsupported_blocks(
    operands.layout
  ) or gpu_targets.unsupported_arrays(operands.q, operands.v)


IMPLEMENTATIONS, interpreted = gpu_targets.implementations(
  gpu_forward.forward, gpu_backward.backward, supports, needs_transpose=True
)
