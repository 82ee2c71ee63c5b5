"""Column and block sums of the softmax for TPU, by Pallas.

The kernels share plan, streams and tiles with block-sparse attention: columns
are sums over the transposed lists, blocks over the lists of the queries. Both
multiply queries and keys only.
"""

import functools

from pallas_kernels.attention_mass import tpu_backward, tpu_forward
from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.walks import tpu_plan


def supports(operands, params, *rest):
  """The reason against these operands, or None; see `contract`."""
  del rest
  layout = operands.layout
  reason = tpu.unsupported(operands, params)
  if reason is not None:
    return reason
  # One row of 128 lanes for each block of the other side, and head of a pack.
  plan = tpu_plan.make(operands)
  blocks = max(layout.q_blocks, layout.k_blocks)
  return tpu_plan.too_large(
    f"sums over {layout.q_blocks} x {layout.k_blocks} blocks",
    plan.vmem() + plan.pack * blocks * tpu_plan.LANES * 4,
    "take larger blocks",
  )


_KERNELS = (tpu_forward.forward, tpu_backward.backward, supports)
# Of the simulator's options, the implementation that has them.
interpreted = functools.partial(tpu.simulated, *_KERNELS)
IMPLEMENTATIONS = (tpu.compiled(*_KERNELS), interpreted())
