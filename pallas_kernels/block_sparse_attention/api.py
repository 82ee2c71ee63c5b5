"""`block_sparse_attention`: the public function.

Its exact meaning is in `pallas_kernels.walks.contract`.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import op, reference, registry
from pallas_kernels.layout import BlockLayout
from pallas_kernels.walks import canonical, contract


def block_sparse_attention(
  q: Float[Array, "*b q h d"],
  k: Float[Array, "*b k g d"],
  v: Float[Array, "*b k g e"],
  layout: BlockLayout,
  *,
  bias: Float[Array, "..."] | None = None,
  q_segment_ids: Int[Array, "*b q"] | None = None,
  k_segment_ids: Int[Array, "*b k"] | None = None,
  scale: float | None = None,
  soft_cap: float | None = None,
  sinks: Float[Array, "h"] | None = None,
  return_lse: bool = False,
  precision: jax.lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Any:
  """Attention over the key blocks that a layout lists, forward and backward.

  Args:
    q: `[*b, q_len, H, D]`, float16, bfloat16, float32 or float64.
    k: `[*b, k_len, G, D]` with G dividing H (grouped-query attention): query
      head h uses key head `h // (H // G)`.
    v: `[*b, k_len, G, Dv]`.
    layout: `BlockLayout` for these lengths; its leading axes broadcast to b,
      its number of heads divides H.
    bias: added to the logits of a key, after scale and soft cap: broadcastable
      to `[*b, H, k_len]`, e.g. log token size (proportional attention).
      Differentiable; -inf hides a key.
    q_segment_ids, k_segment_ids: integers `[*b, q_len]` and `[*b, k_len]`,
      given together: only equal ids attend to each other.
    scale: static factor on q.k, by default `D ** -0.5`.
    soft_cap: static; logits become `soft_cap * tanh(logits / soft_cap)`.
    sinks: `[H]` logits of an extra key with value zero (attention sink),
      differentiable. It counts in `lse`.
    return_lse: whether to return the log of the softmax denominators too.
    precision: `jax.lax.Precision` of the products, by default the backend's.
    implementation: None, or a name of `registry.implementations()`.

  Returns:
    `[*b, q_len, H, Dv]` in q's dtype, and with `return_lse` a tuple of that and
    lse `[*b, H, q_len]`, float32 (float64 for float64). A query that sees no
    key yields 0, and -inf (or its sink) as lse. What is hidden from a query
    has no influence on it, also where it is not finite; a query that sees
    something that is not finite yields NaN.

  Raises:
    ValueError: for shapes that do not fit together, or an unknown name.
    NotImplementedError: if the named implementation cannot run this call.
  """
  call = canonical.Call(
    q=q, k=k, v=v, layout=layout, bias=bias, q_segment_ids=q_segment_ids,
    k_segment_ids=k_segment_ids, scale=scale, soft_cap=soft_cap,
    precision=precision,
  )  # fmt: skip
  operands, params = call.canonical()
  chosen = registry.resolve(operands, params, implementation)
  if sinks is not None:
    if sinks.shape != q.shape[-2:-1]:
      raise ValueError(
        f"sinks has shape {sinks.shape}, must be [heads] = {q.shape[-2:-1]}"
      )
    sinks = sinks.astype(contract.acc_dtype(q))
  if chosen.name == "reference":
    # No custom gradient: the meaning is checked against plain autodiff.
    out, lse = reference.attention(operands, params, sinks)
  else:
    out, lse = op.attend(chosen, params, operands, sinks)
  out = out[:, : layout.q_len].reshape(q.shape[:-1] + v.shape[-1:])
  if not return_lse:
    return out
  lse = lse[:, :, : layout.q_len]
  return out, lse.reshape(q.shape[:-3] + lse.shape[1:])


def resolve_implementation(
  q: Float[Array, "*b q h d"],
  k: Float[Array, "*b k g d"],
  v: Float[Array, "*b k g e"],
  layout: BlockLayout,
  *,
  implementation: str | None = None,
  platform: str | None = None,
  sinks: Float[Array, "h"] | None = None,
  **options: Any,
) -> str:
  """Returns the name of the implementation that such a call would run.

  Args:
    q, k, v, layout, sinks, implementation: as in `block_sparse_attention`;
      arrays may be `jax.ShapeDtypeStruct`s.
    platform: "cpu", "gpu" or "tpu", by default the default backend's.
    **options: further arguments of `block_sparse_attention` that say what is
      computed: bias, segment ids, scale, soft_cap, precision.

  Raises:
    ValueError, NotImplementedError: as `block_sparse_attention`.
    TypeError: for an option that it does not have.
  """
  del sinks  # Handled around every implementation alike.
  found = []

  def trace(call):
    operands, params = call.canonical()
    chosen = registry.resolve(operands, params, implementation, platform)
    found.append(chosen.name)

  call = canonical.Call(q=q, k=k, v=v, layout=layout, **options)
  jax.eval_shape(trace, call)
  return found[0]
