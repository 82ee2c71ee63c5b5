"""Custom VJP and vmap of linear attention on canonical operands.

With `w = exp(log_decay)`, `g = scale * d_out` and S[t] the state after token t,
the gradient G[t] of S[t] runs backward, from `d_last`:

    G[t - 1] = w * (G[t] + q[t]^T g[t])
    d_q[t] = S[t] g[t]      d_k[t] = (G[t] + q[t]^T g[t]) v[t]      d_v likewise

and every pair of tokens that a decay lies between gives log_decay its distance
times what it contributes. Kernels do this by tiles; see `tpu_backward`.
"""

import functools

import jax

from pallas_kernels.block_sparse_attention import op


def attend(implementation, params, operands):
  """Linear attention on canonical operands, forward and backward.

  Args:
    implementation: `contract.Implementation`; see `operands`.
    params: `operands.Params`.
    operands: `operands.Operands`.

  Returns:
    out `[B, n, H, Dv]` and the last state `[B, H, D, Dv]`.
  """
  if implementation.backward is None:
    return implementation.forward(operands, params)
  return _attend(implementation, params, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation, params, operands):
  return _forward(implementation, params, operands, keep=False)[:2]


def _forward(implementation, params, operands, keep):
  run = functools.partial(implementation.forward, params=params, keep=keep)
  return op.batchable(run)(operands)


def _fwd(implementation, params, operands):
  *results, kept = _forward(implementation, params, operands, keep=True)
  return tuple(results), (operands, kept)


def _bwd(implementation, params, residuals, cotangents):
  operands, kept = residuals

  def run(operands, kept, d_out, d_last):
    return implementation.backward(operands, params, kept, d_out, d_last)

  return (op.batchable(run)(operands, kept, *cotangents),)


_attend.defvjp(_fwd, _bwd)
