"""Canonical arguments of linear attention.

An implementation is a `walks.contract.Implementation` whose
functions mean:

    supports(operands, params) -> None or the reason why it cannot run
    forward(operands, params) -> out, last

Kernels, which have no autodiff, are wrapped by `op` and give it:

    forward(operands, params, keep) -> out, last, kept
    backward(operands, params, kept, d_out, d_last) -> gradients, as `Operands`

where `kept` is whatever their backward pass needs, or None without `keep`.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import numpy as jnp

from pallas_kernels.walks import contract


class Operands(NamedTuple):
  """Arrays of a call.

  Attributes:
    q: `[B, n, H, D]`.
    k: `[B, n, G, D]`, G dividing H.
    v: `[B, n, G, Dv]`.
    log_decay: `[B, H]` in the accumulation dtype.
    state: `[B, H, D, Dv]` in the accumulation dtype, before the first token.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array
  state: jax.Array


@dataclasses.dataclass(frozen=True)
class Params:
  """Static choices of a call; see `api.linear_attention`."""

  scale: float
  block: int
  precision: jax.lax.Precision | str | None = None


def canonical(q, k, v, log_decay, initial_state):
  """Checks shapes, fills in defaults and flattens the batch axes.

  Raises:
    ValueError: for shapes that do not fit together.
  """
  _check(q, k, v)
  batch, (heads, width) = q.shape[:-3], q.shape[-2:]
  dtype = contract.acc_dtype(q)
  decay = jnp.zeros((), dtype) if log_decay is None else log_decay
  decay = _wide(jnp.asarray(decay, dtype), batch + (heads,))
  shape = batch + (heads, width, v.shape[-1])
  state = jnp.zeros(shape, dtype)
  if initial_state is not None:
    if initial_state.shape != shape:
      raise ValueError(
        f"initial_state has shape {initial_state.shape}, must be {shape}"
      )
    state = initial_state.astype(dtype)
  flat = lambda x: x.reshape((-1,) + x.shape[len(batch) :])
  return Operands(*map(flat, (q, k, v, decay, state)))


def by_head(operands):
  """q, k, v, log_decay and state with batch and heads in one leading axis.

  Keys and values are repeated for the heads that share them.
  """
  q, k, v, log_decay, state = operands
  times = q.shape[2] // k.shape[2]
  flat = lambda x, times: jnp.swapaxes(
    jnp.repeat(x, times, axis=2), 1, 2
  ).reshape(-1, x.shape[1], x.shape[-1])
  return (
    flat(q, 1),
    flat(k, times),
    flat(v, times),
    log_decay.reshape(-1),
    state.reshape((-1,) + state.shape[-2:]),
  )


def from_heads(operands, out, last):
  """Undoes `by_head` on results `[B * H, n, Dv]` and `[B * H, D, Dv]`."""
  batch, _, heads, _ = operands.q.shape
  split = lambda x: x.reshape((batch, heads) + x.shape[1:])
  return jnp.swapaxes(split(out), 1, 2), split(last)


def _wide(x, shape):
  x = jnp.expand_dims(x, tuple(range(len(shape) - x.ndim)))
  return jnp.broadcast_to(x, shape)


def _check(q, k, v):
  """Raises ValueError for shapes that do not fit together."""
  if (
    q.ndim < 3
    or q.shape[:-2] != k.shape[:-2]
    or k.shape[:-1] != v.shape[:-1]
    or q.shape[-1] != k.shape[-1]
    or q.shape[-2] % k.shape[-2]
  ):
    raise ValueError(
      f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; they must be "
      "[*b, n, H, D], [*b, n, G, D], [*b, n, G, Dv] with G dividing H"
    )
  if len({jax.dtypes.canonicalize_dtype(x.dtype) for x in (q, k, v)}) > 1:
    raise ValueError(
      f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they need one"
    )
