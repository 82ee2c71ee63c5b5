"""Linear attention for NVIDIA Hopper GPUs, by Pallas on Mosaic GPU.

States before runs of 512 tokens are products of matrices, which XLA leaves to
cuBLAS; one kernel makes the outputs and, with the roles of the arrays changed,
the gradients of q, k and v. The gradient of log_decay, where it is asked for,
is that of the XLA form.
"""

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.linear_attention import gpu_kernel, gpu_states, op, xla
from pallas_kernels.linear_attention import operands as forms
from pallas_kernels.walks import canonical, gpu_call, gpu_plan, gpu_targets

# State and queries stay in shared memory.
_MAX_HEAD_SIZE = 128
# Longer cells multiply more, shorter ones move more states.
_CELL, _MANY = 512, 128
_HIGHEST = ("highest", lax.Precision.HIGHEST)


def supports(operands, params):
  """The reason against these operands, or None; see `operands`."""
  reason = gpu_targets.unsupported_arrays(
    operands.q, operands.v, _MAX_HEAD_SIZE,
    "GPU kernel of linear attention takes",
  )  # fmt: skip
  if reason is not None:
    return reason
  if params.precision in _HIGHEST:
    return (
      f"precision={params.precision!r}, the GPU kernel rounds decayed products "
      "to the dtype of q"
    )
  return None


def forward(operands, params, keep=False, interpret=None):
  """See `operands`; nothing is kept for backward."""
  bad = op.bad_results(operands)
  q, k, v, decay, state = op.cleaned(operands)
  out, last = _walk(
    _order(operands), q, k, v, decay, state, params.scale, interpret
  )
  return *op.poisoned(out, last, q, *bad), () if keep else None


def backward(operands, params, kept, d_out, d_last, interpret=None):
  """See `operands`; operands and cotangents are finite."""
  del kept
  q, k, v, decay, state = operands
  g = (params.scale * d_out.astype(jnp.float32)).astype(q.dtype)
  ahead, back = _order(operands), _order(operands, reverse=True, shift=0)
  turned = lambda x: jnp.swapaxes(x, 2, 3)
  d_q, _ = _walk(ahead, g, v, k, decay, turned(state), 1.0, interpret)
  later = gpu_call.after(decay, d_q, interpret)
  d_k, _ = _walk(back, v, g, q, later, turned(d_last), 1.0, interpret)
  later = gpu_call.after(decay, d_k, interpret)
  d_v, d_state = _walk(back, k, q, g, later, d_last, 1.0, interpret)
  of_groups = lambda x, like: (
    x.astype(jnp.float32)
    .reshape(*like.shape[:3], -1, like.shape[3])
    .sum(axis=3)
    .astype(like.dtype)
  )
  # Not computed where nobody asks for it.
  of_decay = lambda x: xla.forward(operands._replace(log_decay=x), params)
  (d_decay,) = jax.vjp(of_decay, decay)[1]((d_out.astype(decay.dtype), d_last))
  return forms.Operands(
    d_q, of_groups(d_k, k), of_groups(d_v, v), d_decay, d_state
  )


def _order(operands, **options):
  length = operands.q.shape[1]
  cell = _CELL
  while length > cell * _MANY:
    cell *= 2
  return gpu_kernel.Order(length, cell, **options)


def _walk(order, q, k, v, log_decay, initial, scale, interpret):
  """Outputs `[B, n, H, Dv]` and the last state `[B, H, D, Dv]`."""
  d, dv = initial.shape[2:]
  width, v_width = gpu_plan.padded(d), gpu_plan.padded(dv)

  def padded(x):
    x = canonical.padded(x, 1, order.blocks * gpu_kernel.BLOCK)
    return canonical.padded(x, 3, gpu_plan.padded(x.shape[3]))

  states, last = gpu_states.before_cells(order, k, v, log_decay, initial)
  states = canonical.padded(canonical.padded(states, 3, width), 4, v_width)
  out = gpu_kernel.run(
    order, padded(q), padded(k), padded(v), states.astype(q.dtype), log_decay,
    scale, interpret,
  )  # fmt: skip
  return out[:, : order.length, :, :dv], last


IMPLEMENTATIONS, interpreted = gpu_targets.implementations(
  forward, backward, supports
)
