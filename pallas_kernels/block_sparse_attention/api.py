"""`block_sparse_attention`: the public function; see `contract` for meaning."""

import jax

from pallas_kernels.block_sparse_attention import op, reference, registry
from pallas_kernels.walks import canonical, contract


def block_sparse_attention(
  q,
  k,
  v,
  layout,
  *,
  bias=None,
  q_segment_ids=None,
  k_segment_ids=None,
  scale=None,
  soft_cap=None,
  sinks=None,
  return_lse=False,
  precision=None,
  implementation=None,
):
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
    `[*b, q_len, H, Dv]` in q's dtype, and with `return_lse` also lse
    `[*b, H, q_len]`, float32 (float64 for float64). A query that sees no key
    yields 0, and -inf (or its sink) as lse.

  Raises:
    ValueError: for shapes that do not fit together, or an unknown name.
    NotImplementedError: if the named implementation cannot run this call.
  """
  batch = q.shape[:-3]
  chosen, operands, params = _prepare(
    q,
    k,
    v,
    layout,
    bias,
    q_segment_ids,
    k_segment_ids,
    scale,
    soft_cap,
    precision,
    implementation,
    None,
  )
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
  return out, lse.reshape(batch + lse.shape[1:])


def resolve_implementation(
  q,
  k,
  v,
  layout,
  *,
  bias=None,
  q_segment_ids=None,
  k_segment_ids=None,
  scale=None,
  soft_cap=None,
  sinks=None,
  precision=None,
  implementation=None,
  platform=None,
):
  """Returns the name of the implementation that such a call would run.

  Arguments are those of `block_sparse_attention`; arrays may be
  `jax.ShapeDtypeStruct`s. `platform` is "cpu", "gpu" or "tpu", by default the
  default backend's.

  Raises:
    ValueError, NotImplementedError: as `block_sparse_attention`.
  """
  del sinks  # Handled around every implementation alike.
  found = []

  def trace(q, k, v, layout, bias, q_segment_ids, k_segment_ids):
    found.append(
      _prepare(
        q,
        k,
        v,
        layout,
        bias,
        q_segment_ids,
        k_segment_ids,
        scale,
        soft_cap,
        precision,
        implementation,
        platform,
      )[0].name
    )

  jax.eval_shape(trace, q, k, v, layout, bias, q_segment_ids, k_segment_ids)
  return found[0]


def _prepare(
  q,
  k,
  v,
  layout,
  bias,
  q_segment_ids,
  k_segment_ids,
  scale,
  soft_cap,
  precision,
  implementation,
  platform,
):
  """Returns the implementation, and operands and params in canonical form."""
  canonical.check(q, k, v, layout)
  operands = canonical.operands(
    q, k, v, layout, bias, q_segment_ids, k_segment_ids
  )
  params = canonical.params(q, scale, soft_cap, precision)
  chosen = registry.resolve(operands, params, implementation, platform)
  return chosen, operands, params
