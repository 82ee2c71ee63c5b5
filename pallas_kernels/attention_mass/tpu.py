"""Column and block sums of the softmax for TPU, by Pallas.

The kernels share plan, streams and tiles with block-sparse attention: columns
are sums over the transposed lists, blocks over the lists of the queries. Both
multiply queries and keys only.
"""

import functools

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention_mass import tpu_backward, tpu_forward
from pallas_kernels.block_sparse_attention import contract, tpu, tpu_plan


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
  needed = plan.vmem() + plan.pack * blocks * tpu_plan.LANES * 4
  if needed > tpu_plan.VMEM_LIMIT:
    return (
      f"sums over {layout.q_blocks} x {layout.k_blocks} blocks need about "
      f"{needed >> 20} MiB of VMEM, at most {tpu_plan.VMEM_LIMIT >> 20} are "
      "used; take larger blocks"
    )
  return None


def _supports_here(*call):
  return tpu.not_here() or supports(*call)


@functools.cache
def interpreted(**options):
  """The implementation that simulates the kernels on any backend.

  Args:
    **options: of `pltpu.InterpretParams`, for example `detect_races=True`.
  """
  interpret = pltpu.InterpretParams(**options)
  return contract.Implementation(
    "tpu_interpret",
    functools.partial(tpu_forward.forward, interpret=interpret),
    functools.partial(tpu_backward.backward, interpret=interpret),
    supports,
    needs_transpose=True,
  )


IMPLEMENTATIONS = (
  contract.Implementation(
    "tpu",
    tpu_forward.forward,
    tpu_backward.backward,
    _supports_here,
    platforms=("tpu",),
    needs_transpose=True,
  ),
  interpreted(),
)
