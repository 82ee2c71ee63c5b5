"""Attention received by keys, by blocks, and given by chosen queries.

With p[h, i, j] the softmax over the visible keys j (as in
`block_sparse_attention`, a row that sees nothing being 0):

    attention_mass: sum_i weight[h, i] * p[h, i, j]            [*b, H, k_len]
    block_mass:     the same, summed over query and key blocks
    attention_rows: p[h, rows, :]                              [*b, H, r, k_len]

Nothing of size q_len * k_len is held. All are differentiable in q, k, bias,
weights and lse. Sums accumulate in float32 (float64 for float64 inputs). Rows
are two plain products on every backend; the sums have kernels of their own.
"""

from typing import Any

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import choice
from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import op, reference
from pallas_kernels.block_sparse_attention import op as attention_op
from pallas_kernels.block_sparse_attention import registry
from pallas_kernels.layout import BlockLayout, elements
from pallas_kernels.walks import canonical, contract, hidden, numerics

_PACKAGE = "pallas_kernels.attention_mass"


def masses(
  q: Float[Array, "*b q h d"],
  k: Float[Array, "*b k g d"],
  *,
  layout: BlockLayout | None = None,
  lse: Float[Array, "*b h q"] | None = None,
  weights: Float[Array, "..."] | None = None,
  bias: Float[Array, "..."] | None = None,
  q_segment_ids: Int[Array, "*b q"] | None = None,
  k_segment_ids: Int[Array, "*b k"] | None = None,
  scale: float | None = None,
  soft_cap: float | None = None,
  precision: jax.lax.PrecisionLike = None,
  implementation: str | None = None,
  block_q: int = 128,
  block_k: int = 128,
) -> tuple[Float[Array, "*b h k"], Float[Array, "*b h i j"]]:
  """Column sums and block sums of the softmax, per head.

  Args:
    q: `[*b, q_len, H, D]`.
    k: `[*b, k_len, G, D]`, G dividing H.
    layout: BlockLayout of the visible pairs, by default all.
    lse: `[*b, H, q_len]` from `block_sparse_attention(..., return_lse=True)`
      with the same arguments, which saves the pass that computes it. With
      sinks it says how much the sinks take. -inf rows count as empty.
    weights: broadcastable to `[*b, H, q_len]`, a factor per query; zeros leave
      queries out (padding, or all but the last ones).
    bias: broadcastable to `[*b, H, k_len]`, added to the logits.
    q_segment_ids, k_segment_ids: only equal ids see each other.
    scale, soft_cap, precision: as in `block_sparse_attention`.
    implementation: None (by platform), "tpu", "tpu_interpret", "gpu",
      "gpu_interpret", "xla" or "reference".
    block_q, block_k: block sizes in tokens where no layout says them.

  Returns:
    float32 `[*b, H, k_len]` and `[*b, H, q blocks, k blocks]`. A query that is
    hidden from a key, or has weight 0, gives it 0, also where it is not finite.

  Raises:
    ValueError: for shapes that do not fit, or an unknown implementation.
    NotImplementedError: if the named implementation cannot run this call.
  """
  if layout is None:
    layout = layouts.full(
      q_len=q.shape[-3], k_len=k.shape[-3], block_q=block_q, block_k=block_k
    )
  operands, params = canonical.Call(
    q=q, k=k, layout=layout, bias=bias, q_segment_ids=q_segment_ids,
    k_segment_ids=k_segment_ids, scale=scale, soft_cap=soft_cap,
    precision=precision,
  ).canonical()  # fmt: skip
  chosen = choice.choose(
    choice.implementations(_PACKAGE), (operands, params), implementation
  )
  batch, heads = q.shape[:-3], q.shape[-2]
  shape, size = batch + (heads, layout.q_len), operands.q.shape[1]
  weights = jnp.float32(1) if weights is None else weights
  weights = canonical.lines(weights, q, shape, size)
  if lse is not None:
    lse = canonical.lines(lse, q, shape, size)
  elif chosen.name != "reference":
    lse = _lse(operands, params, chosen.name)
  if chosen.name == "reference":
    columns, blocks = reference.masses(params, operands, weights, lse)
  else:
    columns, blocks = op.masses(chosen, params, operands, weights, lse)
  columns = columns[..., : layout.k_len]
  return (
    columns.reshape(batch + columns.shape[1:]),
    blocks.reshape(batch + blocks.shape[1:]),
  )


def attention_mass(
  q: Float[Array, "*b q h d"], k: Float[Array, "*b k g d"], **options: Any
) -> Float[Array, "*b h k"]:
  """Column sums of the softmax: the attention each key receives, per head.

  Args:
    q, k, **options: as in `masses`.

  Returns:
    float32 `[*b, H, k_len]`.
  """
  return masses(q, k, **options)[0]


def block_mass(
  q: Float[Array, "*b q h d"], k: Float[Array, "*b k g d"], **options: Any
) -> Float[Array, "*b h i j"]:
  """Softmax mass of each block: what a perfect block estimator would know.

  Args:
    q, k, **options: as in `masses`.

  Returns:
    float32 `[*b, H, q blocks, k blocks]`; without weights a row of blocks sums
    to the number of its queries that see anything.
  """
  return masses(q, k, **options)[1]


def _lse(operands, params, name):
  """The log-sum-exp of every row, by an attention pass over thin values."""
  thin = jnp.zeros(operands.k.shape[:-1] + (1,), operands.k.dtype)
  operands = operands._replace(v=thin)
  attention = registry.resolve(operands, params, name)
  return attention_op.attend(attention, params, operands, None)[1]


def attention_rows(
  q: Float[Array, "*b q h d"],
  k: Float[Array, "*b k g d"],
  rows: ArrayLike,
  *,
  layout: BlockLayout | None = None,
  **options: Any,
) -> Float[Array, "*b h r k"]:
  """Softmax rows of chosen queries, such as a class token or the last ones.

  Args:
    q, k, layout: as in `masses`.
    rows: int `[r]`, query positions `0 ... q_len - 1`, the same for the batch.
    **options: bias, q_segment_ids, k_segment_ids, scale, soft_cap and precision
      as in `masses`.

  Returns:
    float32 `[*b, H, r, k_len]`; a row that sees nothing is all 0.

  Raises:
    ValueError: for shapes that do not fit together.
    TypeError: for an option that there is not.
  """
  rows = jnp.asarray(rows, jnp.int32)
  if layout is None:
    layout = layouts.full(q_len=q.shape[-3], k_len=k.shape[-3])
  call = canonical.Call(q=q, k=k, layout=layout, **options)
  operands, params = call.canonical()
  batch, heads = q.shape[:-3], q.shape[-2]
  k_len, dtype = layout.k_len, contract.acc_dtype(q)
  good = _good_pairs(operands, rows)[..., :k_len]
  operands = hidden.backward(operands)
  chosen = operands.q[:, rows].astype(dtype)
  groups = operands.k.shape[2]
  chosen = chosen.reshape(chosen.shape[:2] + (groups, heads // groups, -1))
  keys = operands.k[:, :k_len].astype(dtype)
  s = params.scale * jnp.einsum(
    "brgmd,bjgd->bgmrj", chosen, keys, precision=params.precision
  )
  s = s.reshape(s.shape[0], heads, *s.shape[3:])
  logits = numerics.capped(s, params.soft_cap)
  mask = elements.row_masks(operands.layout.expand_heads(heads), rows)
  if operands.bias is not None:
    logits = logits + operands.bias[:, :, None, :k_len]
  mask = mask & (logits > -jnp.inf)
  # Rows that see something that is not finite are NaN where they see anything.
  bad = jnp.any(mask & ~good, axis=-1, keepdims=True)
  logits = jnp.where(mask, logits, contract.MAX_INIT)
  p = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0)
  p = jnp.where(mask & bad, jnp.nan, p)
  return p.reshape(batch + p.shape[1:])


def _good_pairs(operands, rows):
  """Whether query, key and bias are finite, or the bias hides the key.

  bool `[B, H or 1, r, K]`.
  """
  q, k, _, bias, _ = operands
  keys = hidden.of_queries(jnp.swapaxes(hidden.finite(k), 1, 2), q.shape[2])
  if bias is not None:
    keys = keys & jnp.isfinite(bias) | jnp.isneginf(bias)
  queries = jnp.swapaxes(hidden.finite(q[:, rows]), 1, 2)
  return keys[:, :, None, :] & queries[..., None]
