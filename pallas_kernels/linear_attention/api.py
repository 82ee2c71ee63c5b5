"""`linear_attention`: the public function.

Lightning Attention-2 (arXiv 2401.04658): per head, with decay factor w,

    out[t] = scale * q[t] . S[t]         S[t] = w * S[t - 1] + k[t]^T v[t]

that is, causal attention without a softmax whose pair (t, s) is weighted by
`w ** (t - s)`. Any feature map is applied to q and k by the caller.
"""

import jax
from jax import numpy as jnp

from pallas_kernels.linear_attention import reference, xla

_RUN = {"xla": xla.attend, "reference": reference.attend}


def linear_attention(
  q,
  k,
  v,
  *,
  log_decay=None,
  initial_state=None,
  scale=1.0,
  return_state=False,
  block=128,
  precision=None,
  implementation=None,
):
  """Causal linear attention, forward and backward, in time linear in length.

  Args:
    q: `[*b, n, H, D]`.
    k: `[*b, n, G, D]`, G dividing H: head h uses key head `h // (H // G)`.
    v: `[*b, n, G, Dv]`.
    log_decay: log of the decay factor, at most 0, broadcastable to `[*b, H]`;
      None means no decay. Differentiable.
    initial_state: `[*b, H, D, Dv]`, S before the first token; default zeros.
    scale: static factor on the result.
    return_state: whether to return the last state too, for decoding on.
    block: tile length in tokens of the XLA path.
    precision: `jax.lax.Precision` of the products.
    implementation: None, "xla" or "reference".

  Returns:
    `[*b, n, H, Dv]` in q's dtype, and with `return_state` also the state
    `[*b, H, D, Dv]` in float32 (float64 for float64).

  Raises:
    ValueError: for shapes that do not fit, or an unknown implementation.
  """
  if implementation is not None and implementation not in _RUN:
    raise ValueError(
      f"implementation={implementation!r} is unknown; allowed: None, "
      f"{', '.join(map(repr, _RUN))}"
    )
  _check(q, k, v)
  batch, (length, heads, width) = q.shape[:-3], q.shape[-3:]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
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
  times = heads // k.shape[-2]
  by_head = lambda x, times: jnp.swapaxes(
    jnp.repeat(x, times, axis=-2), -2, -3
  ).reshape(-1, length, x.shape[-1])
  run = _RUN[implementation or "xla"]
  out, state = run(
    by_head(q, 1),
    by_head(k, times),
    by_head(v, times),
    decay.reshape(-1),
    state.reshape((-1,) + shape[-2:]),
    scale,
    block,
    precision,
  )
  out = out.reshape(batch + (heads,) + out.shape[1:])
  out = jnp.swapaxes(out, -2, -3).astype(q.dtype)
  return (out, state.reshape(shape)) if return_state else out


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
