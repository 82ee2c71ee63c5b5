"""Column and block sums of the softmax for NVIDIA Hopper GPUs.

The kernels share plan, streams and tiles with block-sparse attention; all walk
over products of queries and keys only. Forward is one kernel for both sums.
"""

from pallas_kernels.attention_mass import gpu_backward, gpu_forward
from pallas_kernels.walks import gpu_targets


def supports(operands, params):
  """The reason against these operands, or None; see `contract`."""
  del params
  return gpu_targets.unsupported_blocks(
    operands.layout
  ) or gpu_targets.unsupported_arrays(operands.q)


IMPLEMENTATIONS, interpreted = gpu_targets.implementations(
  gpu_forward.forward, gpu_backward.backward, supports, needs_transpose=True
)
