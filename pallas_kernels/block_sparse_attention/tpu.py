"""Block-sparse attention for TPU, by Pallas.

`implementation="tpu"` runs on a TPU (or is compiled for one ahead of time, see
`pallas_kernels.aot`); "tpu_interpret" runs the same kernels on any backend in
Pallas's TPU interpreter, which simulates the copies. It is slow and meant for
tests. Block sizes are multiples of 128; on a chip, 256 to 512 use it better:
with 128 queries in a block, loading the keys takes longer than computing.
Head sizes are padded to multiples of 128.
"""

import functools

from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.block_sparse_attention import (
  contract,
  tpu_backward,
  tpu_forward,
  tpu_plan,
)

_DTYPES = ("bfloat16", "float32")
_PRECISIONS = (
  None,
  "default",
  "highest",
  lax.Precision.DEFAULT,
  lax.Precision.HIGHEST,
)


def unsupported(operands, params):
  """The reason against block sizes, dtype or precision, or None."""
  layout = operands.layout
  for name in ("block_q", "block_k"):
    size = getattr(layout, name)
    if size % tpu_plan.LANES:
      return (
        f"the layout's {name} is {size}, the TPU kernels need a multiple "
        f"of {tpu_plan.LANES}"
      )
  if str(operands.q.dtype) not in _DTYPES:
    return (
      f"q, k, v are {operands.q.dtype}, the TPU kernels take "
      f"{' or '.join(_DTYPES)}"
    )
  if params.precision not in _PRECISIONS:
    return (
      f"precision is {params.precision!r}, Pallas on TPU offers "
      f"{', '.join(map(repr, _PRECISIONS))}"
    )
  return None


def supports(operands, params):
  """See `contract`: the reason against these operands, or None."""
  reason, layout = unsupported(operands, params), operands.layout
  if reason is not None:
    return reason
  needed = tpu_plan.make(operands).vmem()
  if needed > tpu_plan.VMEM_LIMIT:
    return (
      f"blocks of {layout.block_q} x {layout.block_k} with head sizes "
      f"{operands.q.shape[-1]} and {operands.v.shape[-1]} need about "
      f"{needed >> 20} MiB of VMEM, at most {tpu_plan.VMEM_LIMIT >> 20} "
      "are used; take smaller blocks"
    )
  return None


def not_here():
  """Why compiled kernels cannot run on the present platform, or None."""
  platform = aot.platform()
  if platform == "tpu":
    return None
  return (
    f"the platform is {platform!r}, and the TPU kernels run on 'tpu'; "
    "implementation='tpu_interpret' simulates them elsewhere"
  )


def _supports_here(operands, params):
  return not_here() or supports(operands, params)


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
