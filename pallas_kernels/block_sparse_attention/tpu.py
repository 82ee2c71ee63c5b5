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
from pallas_kernels.block_sparse_attention import tpu_backward, tpu_forward
from pallas_kernels.walks import contract, int32, tpu_plan

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
  return unsupported_numbers(operands.q.dtype, params.precision)


def unsupported_numbers(dtype, precision):
  """The reason against the dtype of q, k and v or a precision, or None."""
  if str(dtype) not in _DTYPES:
    return f"q, k, v are {dtype}, the TPU kernels take {' or '.join(_DTYPES)}"
  if precision not in _PRECISIONS:
    return (
      f"precision is {precision!r}, Pallas on TPU offers "
      f"{', '.join(map(repr, _PRECISIONS))}"
    )
  return None


def supports(operands, params):
  """See `contract`: the reason against these operands, or None."""
  reason, layout = unsupported(operands, params), operands.layout
  if reason is not None:
    return reason
  return tpu_plan.too_large(
    f"blocks of {layout.block_q} x {layout.block_k} with head sizes "
    f"{operands.q.shape[-1]} and {operands.v.shape[-1]}",
    tpu_plan.make(operands).vmem(),
    "take smaller blocks",
  )


def not_here():
  """Why compiled kernels cannot run on the present platform, or None."""
  platform = aot.platform()
  if platform == "tpu":
    return None
  return (
    f"the platform is {platform!r}, and the TPU kernels run on 'tpu'; "
    "implementation='tpu_interpret' simulates them elsewhere"
  )


@functools.cache
def compiled(forward, backward, supports):
  """The implementation that runs kernels on a TPU.

  Args:
    forward, backward, supports: see `contract.Implementation`; where backward
      is None there are no gradients.
  """
  return contract.Implementation(
    "tpu",
    int32.traced(forward),
    backward and int32.traced(backward),
    lambda *call: not_here() or supports(*call),
    platforms=("tpu",),
    needs_transpose=backward is not None,
  )


@functools.cache
def simulated(forward, backward, supports, **options):
  """The implementation that simulates kernels on any backend.

  Args:
    forward, backward, supports: as for `compiled`.
    **options: of `pltpu.InterpretParams`, for example `detect_races=True`.
  """
  interpret = pltpu.InterpretParams(**options)
  return contract.Implementation(
    "tpu_interpret",
    int32.traced(functools.partial(forward, interpret=interpret)),
    backward and int32.traced(functools.partial(backward, interpret=interpret)),
    supports,
    needs_transpose=backward is not None,
  )


_KERNELS = (tpu_forward.forward, tpu_backward.backward, supports)
# Of the simulator's options, the implementation that has them.
interpreted = functools.partial(simulated, *_KERNELS)
IMPLEMENTATIONS = (compiled(*_KERNELS), interpreted())
