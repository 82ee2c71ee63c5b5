"""Linear attention for TPU, by Pallas: a state in VMEM that walks the tokens.

Names and platforms are those of block-sparse attention. Tiles have multiples
of 128 tokens, and head sizes are padded to multiples of 128. By the compiler's
schedules for v5e and v6e at head size 128, forward and backward together take
about as many instruction bundles a token with tiles of 128 as of 256, and more
with 512: longer tiles use the matrix unit better, but multiply more.
"""

import functools

from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.linear_attention import (
  tpu_backward,
  tpu_forward,
  tpu_plan,
)
from pallas_kernels.walks.tpu_plan import too_large


def supports(operands, params):
  """The reason against these operands, or None; see `operands`."""
  reason = tpu.unsupported_numbers(operands.q.dtype, params.precision)
  if reason is not None:
    return reason
  plan = tpu_plan.make(operands, params)
  return too_large(
    f"tiles of {plan.tile} tokens and states of {plan.d} x {plan.dv} for "
    f"{plan.group} query heads that share a key head",
    plan.vmem(1),
    "smaller blocks and fewer heads per key head need less",
  )


_KERNELS = (tpu_forward.forward, tpu_backward.backward, supports)
# Of the simulator's options, the implementation that has them.
interpreted = functools.partial(tpu.simulated, *_KERNELS)
IMPLEMENTATIONS = (tpu.compiled(*_KERNELS), interpreted())
