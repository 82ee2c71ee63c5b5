"""`decode_attention`: the public function.

Queries of one example see the first `lengths` entries of its cache, or those
of them that a list of blocks or of tokens names, per key head. Only listed or
filled entries are read. Forward only (the loops have run-time lengths), except
for "reference", which is differentiable.
"""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from pallas_kernels import choice
from pallas_kernels.block_sparse_attention import op
from pallas_kernels.decode_attention import operands as forms
from pallas_kernels.decode_attention import splits as rule
from pallas_kernels.walks import contract, hidden

_PACKAGE = "pallas_kernels.decode_attention"


def decode_attention(
  q: Float[Array, "*b t h d"],
  k: Float[Array, "*b n g d"],
  v: Float[Array, "*b n g e"],
  *,
  lengths: ArrayLike | None = None,
  blocks: Int[Array, "*b g m"] | None = None,
  tokens: Int[Array, "*b g m"] | None = None,
  counts: ArrayLike | None = None,
  block_size: int = 128,
  causal: bool = False,
  bias: Float[Array, "..."] | None = None,
  scale: float | None = None,
  soft_cap: float | None = None,
  sinks: Float[Array, "h"] | None = None,
  splits: int | None = None,
  heads_first: bool = False,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Any:
  """Attention of one or few queries over a grouped-query cache.

  Args:
    q: `[*b, t, H, D]`, t new tokens.
    k: `[*b, n, G, D]`, the cache, G dividing H; query head h reads key head
      `h // (H // G)`.
    v: `[*b, n, G, Dv]`.
    lengths: int `[*b]`, filled entries of each cache; default n.
    blocks: int `[*b, G, m]`, numbers of the blocks of `block_size` entries to
      read, none twice; the last block may be cut off by the length.
    tokens: int `[*b, G, m]`, the single entries to read, none twice. At most
      one of blocks and tokens; by default all filled entries are read.
    counts: int `[*b, G]`, how many entries of blocks or tokens count; default
      all m.
    block_size: entries per block, also the step of the loop.
    causal: whether the t queries are the last t filled entries and see only
      up to themselves.
    bias: broadcastable to `[*b, H, n]`, added to the logits.
    scale, soft_cap: as in `block_sparse_attention`.
    sinks: `[H]` logits of an extra key with value zero.
    splits: static number of parts that a read is cut into, merged by their
      log-sum-exps (split-K). None: 1, but on a GPU as many as give all its
      multiprocessors work, see `splits.choose`.
    heads_first: whether k and v are `[*b, G, n, D]`, the order in which a TPU
      reads them without a copy; a GPU does either way.
    return_lse: whether to return the log-sum-exp too.
    implementation: None (by platform), "tpu", "tpu_interpret", "gpu",
      "gpu_interpret", "xla" or "reference".

  Returns:
    `[*b, t, H, Dv]` in q's dtype, and with `return_lse` a tuple of that and
    lse `[*b, H, t]`. Where nothing is visible: 0 and -inf (or the sink).
    Entries that are not visible have no influence, also where they are not
    finite.

  Raises:
    ValueError: for shapes that do not fit, or an unknown implementation.
    NotImplementedError: if the named implementation cannot run this call.
  """
  if splits is not None and splits < 1:
    raise ValueError(f"splits={splits}, must be at least 1, or None")
  given = forms.Operands(q, k, v, lengths, bias, blocks, tokens, counts)
  operands = forms.canonical(given, heads_first)
  n = k.shape[-2 if heads_first else -3]
  options = forms.Options(
    float(q.shape[-1] ** -0.5 if scale is None else scale),
    None if soft_cap is None else float(soft_cap),
    min(block_size, n),
    causal,
    splits or 1,
    heads_first,
  )
  if blocks is not None and block_size > n:
    raise ValueError(
      f"block_size={block_size} exceeds the cache of {n} entries"
    )
  chosen = choice.choose(
    choice.implementations(_PACKAGE), (operands, options), implementation
  )
  if splits is None:
    parts = rule.of_call(chosen.name, operands, options)
    options = dataclasses.replace(options, splits=parts)
  run = lambda x: chosen.forward(x, options)
  if chosen.name == "xla":
    run = op.batchable(lambda x: _forward(chosen, x, options))
  elif chosen.name != "reference":
    run = op.batchable(run)
  out, lse = run(operands)  # [B, t, H, Dv], [B, H, t]
  if sinks is not None:
    out, lse = op.apply_sinks(
      out, lse, jnp.asarray(sinks, contract.acc_dtype(q))
    )
  out = out.astype(q.dtype).reshape(q.shape[:-1] + v.shape[-1:])
  lse = lse.reshape(q.shape[:-3] + lse.shape[1:])
  return (out, lse) if return_lse else out


def _forward(chosen, operands, options):
  """The kernel's results, without influence of what is hidden.

  A kernel multiplies hidden values by zero. Only where that has made something
  of the result not finite is it computed again, from a cache whose bad entries
  are marked (see `walks.hidden`): looking for them in advance would read the
  whole cache once more in every step.
  """
  first = chosen.forward(operands, options)

  def again():
    marked = forms.marked(operands, options)
    return hidden.results(*chosen.forward(marked, options))

  fine = jnp.isfinite(first[0]).all() & ~jnp.isnan(first[1]).any()
  return lax.cond(fine, lambda: first, again)
