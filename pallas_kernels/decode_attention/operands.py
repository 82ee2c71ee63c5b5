"""Canonical arguments of decode attention."""

import dataclasses
from typing import NamedTuple

import jax
from jax import numpy as jnp

from pallas_kernels.walks import contract, hidden


class Operands(NamedTuple):
  """Arrays of a call.

  Attributes:
    q: `[B, t, H, D]`.
    k: `[B, n, G, D]`, or `[B, G, n, D]` with `Options.heads_first`.
    v: `[B, n, G, Dv]`, or `[B, G, n, Dv]`.
    lengths: int32 `[B]`.
    bias: `[B, H, n]` in the accumulation dtype, or None.
    blocks: int32 `[B, G, m]` or None.
    tokens: int32 `[B, G, m]` or None; not both.
    counts: int32 `[B, G]`, entries of blocks or tokens that count, or None.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  lengths: jax.Array
  bias: jax.Array | None
  blocks: jax.Array | None
  tokens: jax.Array | None
  counts: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Options:
  """Static choices of a call; see `api.decode_attention`."""

  scale: float
  soft_cap: float | None
  block_size: int
  causal: bool
  splits: int
  heads_first: bool = False


def canonical(given, heads_first=False):
  """Checks shapes and flattens the batch axes.

  Args:
    given: `Operands` as a caller gives them: arrays with any number of batch
      axes, `lengths` and `counts` None or anything that broadcasts, `bias`
      broadcastable to `[*b, H, n]`.
    heads_first: as in `Options`.

  Raises:
    ValueError: for shapes that do not fit together.
  """
  q, k, v, lengths, bias, blocks, tokens, counts = given
  # What k would be with its heads behind its entries.
  entries, head_axis = (-2, -3) if heads_first else (-3, -2)
  if (
    min(q.ndim, k.ndim) < 3
    or q.shape[:-3] != k.shape[:-3]
    or k.shape[:-1] != v.shape[:-1]
    or q.shape[-1] != k.shape[-1]
    or q.shape[-2] % k.shape[head_axis]
  ):
    cache = "G, n" if heads_first else "n, G"
    raise ValueError(
      f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; they must be "
      f"[*b, t, H, D], [*b, {cache}, D], [*b, {cache}, Dv] with G dividing H"
    )
  if blocks is not None and tokens is not None:
    raise ValueError("give blocks or tokens, not both")
  batch, heads = q.shape[:-3], q.shape[-2]
  n, groups = k.shape[entries], k.shape[head_axis]
  chosen = tokens if blocks is None else blocks
  if chosen is None and counts is not None:
    raise ValueError("counts needs blocks or tokens")
  if chosen is not None:
    if chosen.shape[:-1] != batch + (groups,):
      raise ValueError(
        f"blocks or tokens have shape {chosen.shape}, must be "
        f"{batch + (groups,)} + [m]"
      )
    counts = chosen.shape[-1] if counts is None else counts
    counts = jnp.broadcast_to(
      jnp.asarray(counts, jnp.int32), batch + (groups,)
    ).reshape(-1, groups)
  lengths = n if lengths is None else lengths
  lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), batch)
  if bias is not None:
    bias = bias.astype(contract.acc_dtype(q))
    bias = jnp.expand_dims(bias, tuple(range(len(batch) + 2 - bias.ndim)))
    bias = jnp.broadcast_to(bias, batch + (heads, n)).reshape(-1, heads, n)
  flat = lambda x: (
    None if x is None else x.reshape((-1,) + x.shape[len(batch) :])
  )
  listed = lambda x: None if x is None else flat(x.astype(jnp.int32))
  return Operands(
    flat(q),
    flat(k),
    flat(v),
    lengths.reshape(-1),
    bias,
    listed(blocks),
    listed(tokens),
    counts,
  )


def marked(operands, options):
  """Operands in which entries that are not finite have values of zero.

  Their logits are NaN, which masks hide by selection (see `walks.hidden`).
  """
  good = finite_entries(operands, options)
  wide = good if options.heads_first else jnp.swapaxes(good, 1, 2)
  v = hidden.zeroed(operands.v, wide)
  if operands.bias is None:
    k = jnp.where(wide[..., None], operands.k, jnp.nan)
    return operands._replace(k=k, v=v)
  good = hidden.of_queries(good, operands.q.shape[2])
  bias = operands.bias
  bias = jnp.where(good | jnp.isneginf(bias), bias, jnp.nan)
  k = hidden.zeroed(operands.k, wide)
  return operands._replace(k=k, v=v, bias=bias)


def finite_entries(operands, options):
  """Whether key and value of each entry are finite, bool `[B, G, n]`."""
  good = hidden.finite(operands.k, operands.v)
  return good if options.heads_first else jnp.swapaxes(good, 1, 2)


def last_visible(operands, options):
  """Exclusive end of what each query sees, int32 `[B, t]`."""
  t = operands.q.shape[1]
  back = jnp.arange(t - 1, -1, -1, dtype=jnp.int32) * options.causal
  return operands.lengths[:, None] - back[None, :]


def length(operands, options):
  """Entries of a cache, filled or not."""
  return operands.k.shape[2 if options.heads_first else 1]


def groups(operands, options):
  """Key heads."""
  return operands.k.shape[1 if options.heads_first else 2]


def heads_first(x, options):
  """A cache as `[B, G, n, D]`."""
  return x if options.heads_first else jnp.swapaxes(x, 1, 2)


def heads_last(x, options):
  """A cache as `[B, n, G, D]`."""
  return jnp.swapaxes(x, 1, 2) if options.heads_first else x
