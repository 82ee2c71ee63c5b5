"""What an implementation of block-sparse attention receives and must return.

The public function (`api.py`) brings its arguments into one canonical form,
and everything around a kernel that is not a kernel's business is done there,
once (`op.py`): padding, broadcasting, segments, sinks, vmap, the custom VJP.
An implementation provides three functions over this form:

    supports(operands, params) -> None or the reason why it cannot run
    forward(operands, params) -> out, lse
    backward(operands, params, lse, delta, d_out) -> d_q, d_k, d_v, d_bias

Semantics, with `g = h // (H // G)` and visible pairs as `BlockLayout` says:

    logit[b, h, i, j] = cap(scale * q[b, i, h] . k[b, j, g]) + bias[b, h, j]
    cap(x) = soft_cap * tanh(x / soft_cap), or x
    lse[b, h, i]  = log sum over visible j of exp(logit)
    out[b, i, h]  = sum over visible j of exp(logit - lse) * v[b, j, g]

Rules:

*   Products accumulate in `acc_dtype(q)` (float32, or float64 for float64),
    and so do maxima, sums, lse, delta and d_bias. `out` and the gradients of
    q, k and v come back in the dtype of q, k and v. Probabilities may be
    rounded to v's dtype before the second product, as flash kernels do.
*   A row that sees nothing: out 0, lse -inf. Mask logits with -inf, and start
    the running maximum from the finite `MAX_INIT`, so that exp never sees
    inf - inf. A bias of -inf hides a key (with a zero gradient).
*   backward gets `lse` with **+inf in rows without probability** (empty or
    padded), so `p = exp(logit - lse)` is 0 there without a test, and
    `delta = sum_d(d_out * out) - d_lse`. With `p` as above:
        d_logit = p * (d_out . v - delta)
        d_bias[j] = sum_i d_logit          d_v[j] = sum_i p * d_out
        d_s = d_logit * (1 - (cap(s) / soft_cap)^2)     with s = scale * q . k
        d_q[i] = scale * sum_j d_s * k     d_k[j] = scale * sum_i d_s * q
    d_k, d_v are summed over the query heads of a group; d_bias is not.
*   backward sees `operands.layout.transpose` filled in when the implementation
    says `needs_transpose`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

# Where running maxima start. Logits below it count as masked.
MAX_INIT = -1e30


class Operands(NamedTuple):
  """Arrays of a call, in canonical form.

  Attributes:
    q: `[B, q blocks * block_q, H, D]`, padded with zeros.
    k: `[B, k blocks * block_k, G, D]`, padded with zeros; G divides H.
    v: `[B, k blocks * block_k, G, Dv]`, padded with zeros.
    bias: `acc_dtype` `[B, H, k blocks * block_k]` (zeros in the padding) or
      None: None means no gradient is wanted either.
    layout: BlockLayout with exactly one leading axis, of size 1 or B, and L
      heads (L divides H). Its segments, if any, are padded like q and k. Its
      `q_len` and `k_len` stay those of the caller: keys from `k_len` on are
      masked in partial blocks, and are in no full block.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  bias: jax.Array | None
  layout: Any


@dataclasses.dataclass(frozen=True)
class Params:
  """Static numbers of a call: factor on q.k, soft cap or None, precision."""

  scale: float
  soft_cap: float | None = None
  precision: jax.lax.Precision | None = None


def _no_reason(operands, params):
  del operands, params


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute the operation.

  Attributes:
    name: what a caller passes as `implementation`.
    forward, backward: see the module's docstring.
    supports: returns None, or why these operands cannot be computed, naming
      the argument, what was given and what is allowed. Looks at shapes,
      dtypes and static values only (operands may be ShapeDtypeStructs).
    platforms: `jax.default_backend()` names where `implementation=None` may
      pick it; empty for interpreters, which run only when named.
    needs_transpose: whether backward reads `layout.transpose`.
    selects: whether its functions take numbers that are not finite and give
      those that a mask hides no influence; others get prepared operands, see
      `walks.hidden`.
  """

  name: str
  forward: Callable[..., Any]
  backward: Callable[..., Any]
  supports: Callable[..., str | None] = _no_reason
  platforms: tuple = ()
  needs_transpose: bool = False
  selects: bool = False


def acc_dtype(q):
  """The dtype of sums: float32, or float64 for float64 inputs."""
  return jnp.promote_types(q.dtype, jnp.float32)
