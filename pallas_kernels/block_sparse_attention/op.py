"""Everything around a kernel: custom VJP, vmap, sinks, delta and empty rows.

What is not finite is kept from kernels here too (see `walks.hidden`).

`attend` works on canonical operands (`contract.Operands`). The custom VJP is
outermost; inside it forward and backward are custom-vmapped, so that a vmap of
any depth becomes a larger batch and a kernel never sees a batching tracer.
"""

import functools

import jax
from jax import numpy as jnp

from pallas_kernels.walks import contract, hidden


def apply_sinks(out, lse, sinks):
  """Lets each row also attend to a value of zero with logit `sinks[h]`.

  Args:
    out: `[B, Q, H, Dv]`, attention without sinks.
    lse: `[B, H, Q]`, its log-sum-exp.
    sinks: `[H]` logits.

  Returns:
    out and lse with the sink in the denominator; lse is then finite.
  """
  sinks = jnp.expand_dims(sinks.astype(lse.dtype), (0, 2))
  total = jnp.logaddexp(lse, sinks)
  share = jnp.exp(lse - total)
  share = jnp.expand_dims(jnp.swapaxes(share, 1, 2), -1)
  return (out * share).astype(out.dtype), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(implementation, params, operands, sinks):
  """Attention on canonical operands.

  Args:
    implementation: `contract.Implementation`.
    params: `contract.Params`.
    operands: `contract.Operands`.
    sinks: `[H]` logits in the accumulation dtype, or None.

  Returns:
    out `[B, Q, H, Dv]` and lse `[B, H, Q]`, padded rows included.
  """
  return _attend_fwd(implementation, params, operands, sinks)[0]


def _attend_fwd(implementation, params, operands, sinks):
  forward = batchable(functools.partial(_forward, implementation, params))
  given = operands if implementation.selects else hidden.forward(operands)
  out, lse = hidden.results(*forward(given))
  if sinks is not None:
    out, lse = apply_sinks(out, lse, sinks)
  return (out, lse), (operands, sinks, out, lse)


def _forward(implementation, params, operands):
  return implementation.forward(operands, params)


def _attend_bwd(implementation, params, residuals, cotangents):
  operands, sinks, out, lse = residuals
  d_out, d_lse = cotangents
  dtype = contract.acc_dtype(operands.q)
  delta = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)
  delta = jnp.swapaxes(delta, 1, 2) - d_lse
  good = hidden.queries(lse, delta, d_out)
  mark = functools.partial(
    hidden.with_nan, good=good, lse=lse, d_out=d_out, d_lse=d_lse
  )
  d_out = hidden.without_bad(d_out, good)
  delta, lse = jnp.where(good, delta, 0), jnp.where(good, lse, jnp.inf)
  d_sinks = None
  if sinks is not None:
    share = jnp.exp(jnp.expand_dims(sinks, (0, 2)) - lse)
    d_sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
  q_len = operands.layout.q_len
  lse = lse.at[:, :, q_len:].set(jnp.inf)
  if not implementation.selects:
    operands = hidden.backward(operands)
  if implementation.needs_transpose:
    operands = operands._replace(layout=operands.layout.with_transpose())
  backward = batchable(functools.partial(_backward, implementation, params))
  d_q, d_k, d_v, d_bias = backward(operands, lse, delta, d_out)
  d_operands = contract.Operands(mark(d_q), d_k, d_v, d_bias, None)
  return d_operands, d_sinks


def _backward(implementation, params, operands, lse, delta, d_out):
  return implementation.backward(operands, params, lse, delta, d_out)


attend.defvjp(_attend_fwd, _attend_bwd)


def batchable(fn):
  """Makes vmap of `fn(operands, ...)` a call with a larger batch."""
  wrapped = jax.custom_batching.custom_vmap(fn)

  @wrapped.def_vmap
  def rule(size, batched, operands, *rest):
    batch = operands.q.shape[1 if batched[0].q else 0]
    fold = functools.partial(_fold, size, batch)
    tree = jax.tree.map(fold, (operands, *rest), tuple(batched))
    # Nested vmaps reach the wrapped function again.
    result = batchable(fn)(*tree)
    unfold = lambda x: x.reshape((size, batch) + x.shape[1:])
    return (jax.tree.map(unfold, result), jax.tree.map(lambda x: True, result))

  return wrapped


def _fold(size, batch, value, is_batched):
  """Merges a mapped axis into the batch axis; layouts may have batch 1."""
  if not is_batched:
    if value.shape[0] == 1 and batch != 1:
      return value
    value = jnp.broadcast_to(value[None], (size,) + value.shape)
  elif value.shape[1] != batch:
    shape = (size, batch) + value.shape[2:]
    value = jnp.broadcast_to(value, shape)
  return value.reshape((-1,) + value.shape[2:])
