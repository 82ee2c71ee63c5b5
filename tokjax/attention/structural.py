"""Masks that follow the structure of an input: tables, pages, translations.

For encoders, of one example: lift them with `jax.vmap`. `prefix_global` is a
pattern for `pallas_kernels.block_sparse_attention`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import layout as layouts


def prefix_global(first: int, radius: int) -> layouts.Pattern:
  """The first tokens see all and are seen by all; others see neighbours.

  Prefix Global attention (Burns et al., 2023, arXiv 2305.03668), from the text
  of the paper: the most important section of a page comes first. The published
  numbers are 512 first tokens and a radius of 127 for 1024 tokens.

  Args:
    first: how many tokens are global.
    radius: tokens on either side that the others see.

  Raises:
    ValueError: an argument is negative.
  """
  for name, value in (("first", first), ("radius", radius)):
    if value < 0:
      raise ValueError(f"{name}={value}: must be 0 or more")
  return layouts.Global(count=first) | layouts.Window(radius, radius)


def _buckets(
  ids: Int[Array, "n"], valid: Bool[Array, "n"], bucket: int, header: int
) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
  """Order of tokens by id, padding last, and the bucket of each token."""
  order = jnp.lexsort((ids, ~valid))
  rank = jnp.argsort(order)
  return order, jnp.maximum((rank - header) // bucket + 1, 0)


def table_mask(
  row: Int[Array, "n"],
  column: Int[Array, "n"],
  text: Bool[Array, "n"],
  valid: Bool[Array, "n"],
  *,
  heads: int,
  row_heads: int,
  bucket: int = 0,
  header: int | None = None,
) -> Bool[Array, "h n n"]:
  """MATE: heads that look along rows of a table, and heads along columns.

  A token sees the tokens of its row (its column) and the text; the text sees
  everything. Eisenschlos et al., 2021; from google-research/tapas:
  tapas/utils/attention_utils.py (569a3c3), read, not run. Deviation: the second
  bucket and the last one do not see each other, which there is a side effect.

  Args:
    row, column: of each token, from 0 on, as the model's embeddings have them.
    text: tokens of the question.
    valid: real tokens.
    heads: number of heads; the first `row_heads` of them look along rows.
    row_heads: as many.
    bucket: with the tokens sorted by row (column), only neighbouring buckets of
      so many tokens see each other; 0: no such bound.
    header: first sorted tokens, which are exempt from it; None: `bucket`. It
      should hold the question.

  Raises:
    ValueError: a number is out of range.
  """
  _check(heads, row_heads, bucket, header)

  def of(ids):
    same = ids[:, None] == ids[None]
    seen = (same | text[:, None] | text[None]) & valid[None]
    if not bucket:
      return seen
    number = _buckets(
      ids, valid, bucket, bucket if header is None else header
    )[1]
    near = jnp.abs(number[:, None] - number[None]) <= 1
    return seen & (near | (number == 0)[:, None] | (number == 0)[None])

  shape = lambda of, h: jnp.broadcast_to(of[None], (h, *of.shape))
  return jnp.concatenate(
    [shape(of(row), row_heads), shape(of(column), heads - row_heads)]
  )


def _check(heads, row_heads, bucket, header):
  if not 0 <= row_heads <= heads:
    raise ValueError(
      f"row_heads={row_heads}: must lie in 0..{heads}, the heads"
    )
  for name, value in (("bucket", bucket), ("header", header)):
    if value is not None and value < 0:
      raise ValueError(f"{name}={value}: must be 0 or more")


def table_attention(
  q: Float[Array, "n h d"],
  k: Float[Array, "n h d"],
  v: Float[Array, "n h d"],
  row: Int[Array, "n"],
  column: Int[Array, "n"],
  text: Bool[Array, "n"],
  valid: Bool[Array, "n"],
  *,
  row_heads: int,
  bucket: int,
  header: int | None = None,
) -> Float[Array, "n h d"]:
  """Attention with `table_mask`, in time linear in the number of tokens.

  Tokens are sorted for each of the two kinds of heads; a bucket is compared
  with the header, with itself and with its neighbours, the header with
  everything. Scaled by the root of d.

  Args:
    q, k, v: of the tokens, in any order.
    row, column, text, valid, row_heads: as for `table_mask`.
    bucket: tokens a bucket, 1 or more.
    header: first sorted tokens, which see and are seen across buckets; None:
      `bucket`.

  Raises:
    ValueError: a number is out of range.
  """
  _check(q.shape[1], row_heads, bucket, header)
  if not bucket:
    raise ValueError("bucket=0: must be 1 or more")
  header = bucket if header is None else header

  def of(ids, part):
    cut = lambda x: x[:, part]
    return _sorted_attention(
      cut(q), cut(k), cut(v), ids, text, valid, bucket, min(header, len(q))
    )

  parts = (of(row, slice(row_heads)), of(column, slice(row_heads, None)))
  return jnp.concatenate(parts, axis=1)


def _sorted_attention(q, k, v, ids, text, valid, bucket, header):
  n = len(q)
  order = _buckets(ids, valid, bucket, header)[0]
  more = -(n - header) % bucket

  def sort(x):
    x = x[order]
    return jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))

  q, k, v, ids, text, valid = map(sort, (q, k, v, ids, text, valid))
  v = jnp.where(valid[:, None, None], v, 0.0)
  first = (q[:header], ids[:header], text[:header])
  everything = (k, v, ids, text, valid)
  out = [_attended(first, everything)]
  if header < n:
    tail = lambda x: x[header:].reshape(-1, bucket, *x.shape[1:])

    def window(x):
      """Header, bucket before, bucket, bucket behind: of each bucket."""
      own = tail(x)
      ends = jnp.zeros_like(own[:1])
      before = jnp.concatenate([ends, own[:-1]])
      after = jnp.concatenate([own[1:], ends])
      head = jnp.broadcast_to(x[:header][None], (len(own), *x[:header].shape))
      return jnp.concatenate([head, before, own, after], axis=1)

    rest = jax.vmap(_attended)(
      tuple(map(tail, (q, ids, text))), tuple(map(window, everything))
    )
    out.append(rest.reshape(-1, *rest.shape[2:]))
  return jnp.concatenate(out)[:n][jnp.argsort(order)]


def _attended(queries, keys):
  q, q_ids, q_text = queries
  k, v, ids, text, valid = keys
  seen = (q_ids[:, None] == ids[None]) | q_text[:, None] | text[None]
  seen = seen & valid[None]
  x = jnp.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
  weight = jax.nn.softmax(x, axis=-1, where=seen[None])
  return jnp.einsum("hij,jhd->ihd", weight, v)


def registers(length: Int[Array, "..."], factor: int = 1) -> Int[Array, "..."]:
  """MITRE's number of registers of a source: its length over `factor`, up.

  `length` counts all tokens but padding, the language tag and the end included
  (transformer_encoder_register.py).

  Raises:
    ValueError: `factor` is below 1.
  """
  if factor < 1:
    raise ValueError(f"factor={factor}: must be 1 or more")
  return -(-length // factor)


def register_mask(
  source: Bool[Array, "n"], register: Bool[Array, "n"], valid: Bool[Array, "n"]
) -> Bool[Array, "n n"]:
  """MITRE: a translation sees its source through registers alone.

  Source tokens see each other; registers see the source and each other; tokens
  of the translation, which are all others, see registers and what came before
  them. The source's keys and values are needed no more once the registers are
  there. Qu et al., 2025; checked against zhiqu22/mitre:
  mitre/models/transformer_decoder_register.py (5e19fbf), whose mask was run
  next to this one on ragged batches. Rows of padding see nothing here.

  Args:
    source: tokens of the source, its language tag first.
    register: registers, which all begin as the tag's embedding.
    valid: real tokens; padding may stand anywhere.
  """
  target = ~(source | register)
  place = jnp.arange(len(source))
  before = place[None] <= place[:, None]
  seen = (source[:, None] & source[None]) | (
    register[:, None] & (source | register)[None]
  )
  seen = seen | (target[:, None] & register[None])
  seen = seen | (target[:, None] & target[None] & before)
  return seen & valid[None] & valid[:, None]
