"""Which tokens stay: from scores `[n]` to indices `[k]`.

The same functions pick tokens, blocks of keys and cache entries; lift them
over batches, heads and query blocks with `jax.vmap`.
"""

import functools
import string
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num


class Selection(NamedTuple):
  """Attributes:
  index: which of the n stay, distinct, `[k]`.
  valid: False where fewer than k were to be had, `[k]`; None: all valid.
  """

  index: Int[Array, "k"]
  valid: Bool[Array, "k"] | None

  @property
  def total(self) -> Int[Array, ""]:
    """How many are valid."""
    if self.valid is None:
      return jnp.int32(self.index.shape[0])
    return self.valid.sum(dtype=jnp.int32)


def first_max(
  values: Float[Array, "*a"], axis: int
) -> tuple[Float[Array, "*b"], Int[Array, "*b"]]:
  """The largest value along an axis and the first index that has it.

  As `max` and `argmax`, but in two reductions that XLA vectorises: on a CPU
  core 8 x 98 x 98 values take 0.05 to 0.1 ms instead of 0.35 ms.
  """
  best = values.max(axis=axis, keepdims=True)
  iota = jax.lax.broadcasted_iota(jnp.int32, values.shape, axis % values.ndim)
  first = jnp.where(values == best, iota, values.shape[axis] - 1).min(axis=axis)
  return best.squeeze(axis), first


def top_k(
  score: Float[Array, "n"],
  k: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Selection:
  """The k largest scores in descending order; ties go to the lower index.

  Args:
    score: `[n]`.
    k: how many (static), at most n.
    mask: False excludes a token.
    count: how many of the k this example may keep (traced); default all.
  """
  if not 0 <= k <= score.shape[0]:
    raise ValueError(f"k={k}: must lie in 0..{score.shape[0]}")
  if mask is not None:
    score = jnp.where(mask, score, -jnp.inf)
  index = top_indices(score, k)
  valid = None if mask is None else mask[index]
  if count is not None:
    within = jnp.arange(k) < count
    valid = within if valid is None else valid & within
  return Selection(index, valid)


def in_order(selection: Selection) -> Selection:
  """The same selection in ascending index, invalid entries last."""
  index, valid = selection
  if valid is None:
    return Selection(jnp.sort(index), None)
  perm = jnp.lexsort((index, ~valid))
  return Selection(index[perm], valid[perm])


class Partition(NamedTuple):
  """Tokens that are chosen, then the others, both as they came.

  Attributes:
    index: the token that goes to each place, `[n]`.
    place: where each token goes, `[n]`.
  """

  index: Int[Array, "n"]
  place: Int[Array, "n"]


def partition(chosen: Bool[Array, "n"]) -> Partition:
  """Chosen tokens first.

  By counting: 8192 tokens take a CPU 0.13 ms, a stable sort of them 1.2 ms.
  """
  index = jnp.arange(chosen.shape[0], dtype=jnp.int32)
  before = jnp.cumsum(chosen, dtype=jnp.int32)  # The token itself included.
  others = chosen.sum(dtype=jnp.int32) + index - before
  place = jnp.where(chosen, before - 1, others)
  moved = jnp.zeros_like(index).at[place]
  moved = moved.set(index, unique_indices=True, mode="promise_in_bounds")
  return Partition(moved, place)


def of_mask(
  chosen: Bool[Array, "n"], k: int, *, order: Num[Array, "n"] | None = None
) -> Selection:
  """The tokens that are `chosen`, k at most, the rest of the k invalid.

  Args:
    chosen: True for tokens that stay.
    k: room (static), at most n.
    order: they stand in ascending order of this; default: of their index.
  """
  if order is None:
    index = partition(chosen).index[:k]
  else:
    index = jnp.lexsort((order, ~chosen))[:k]
  return Selection(index, chosen[index])


def top_mass(
  mass: Float[Array, "n"],
  share: float,
  *,
  forced: Bool[Array, "n"],
  mask: Bool[Array, "n"],
) -> Bool[Array, "n"]:
  """Forced entries, then the largest until they hold a share of the total.

  An entry is added as long as what is chosen before it holds less than
  `share` of the masked total. Ties go to the lower index.

  Args:
    mass: non-negative.
    share: in [0, 1].
    forced: always chosen.
    mask: False excludes an entry.
  """
  mass = jnp.where(mask, mass, 0.0)
  forced = forced & mask
  order = jnp.lexsort((-mass, forced | ~mask))
  sorted_ = jnp.where(forced, 0.0, mass)[order]
  before = jnp.where(forced, mass, 0.0).sum() + jnp.cumsum(sorted_) - sorted_
  taken = jnp.zeros(mass.shape, bool).at[order].set(before < share * mass.sum())
  return (taken & mask) | forced


def places(
  score: Float[Array, "n"], *, mask: Bool[Array, "n"] | None = None
) -> Int[Array, "n"]:
  """Where each token stands when all are sorted by descending score.

  Ties go to the lower index; tokens where `mask` is False stand last.
  """
  last = jnp.zeros(score.shape, bool) if mask is None else ~mask
  order = jnp.lexsort((-score, last))
  return jnp.zeros_like(order).at[order].set(jnp.arange(score.shape[0]))


def groups(
  *keys: Int[Array, "n"], mask: Bool[Array, "n"] | None = None
) -> Int[Array, "n"]:
  """The number of each token's group: those with equal keys form one.

  Groups are numbered from 0 in ascending order of their keys, the first key
  counting most; tokens where `mask` is False have the number n.
  """
  n = keys[0].shape[0]
  last = jnp.zeros((n,), bool) if mask is None else ~mask
  order = jnp.lexsort((*keys[::-1], last))
  row = jnp.stack(keys)[:, order]
  new = (row[:, 1:] != row[:, :-1]).any(axis=0)
  number = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(new)])
  number = jnp.zeros((n,), jnp.int32).at[order].set(number.astype(jnp.int32))
  return jnp.where(last, n, number)


def places_within(
  score: Float[Array, "n"], group: Int[Array, "n"]
) -> Int[Array, "n"]:
  """Where each token stands in its group, sorted by descending score.

  Ties go to the lower index.

  Args:
    score: of tokens.
    group: see `groups`.
  """
  order = jnp.lexsort((-score, group))
  ordered = group[order]
  first = jnp.searchsorted(ordered, ordered)
  place = jnp.arange(score.shape[0]) - first
  return jnp.zeros_like(order).at[order].set(place.astype(order.dtype))


def stride(
  n: int,
  k: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Selection:
  """Evenly spaced: `floor(linspace(0, n - 1, k))`.

  With a mask the real tokens (numbered in order) are strided over, `count` of
  them, and the rest of the k is invalid.
  """
  if not 1 <= k <= n:
    raise ValueError(f"k={k}: must lie in 1..{n}")
  if mask is None and count is None:
    # Integer arithmetic: exact where linspace rounds down by accident.
    steps = [(i * (n - 1)) // max(k - 1, 1) for i in range(k)]
    return Selection(jnp.array(steps), None)
  mask = jnp.ones((n,), bool) if mask is None else mask
  total = mask.sum()
  count = jnp.minimum(total, k if count is None else count)
  rank = (jnp.arange(k) * (total - 1)) // jnp.maximum(count - 1, 1)
  # Beyond `count` any distinct index serves: the outputs are invalid.
  order = partition(mask).index
  real = jnp.arange(k) < count
  chosen = jnp.zeros((n + 1,), bool)
  chosen = chosen.at[jnp.where(real, rank, n)].set(True)[:n]
  perm = partition(chosen).index[:k]
  return Selection(order[perm], real)


def inverse_cdf(
  score: Float[Array, "n"],
  k: int,
  *,
  rule: str = "code",
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Bool[Array, "n"]:
  """Samples k points of the inverse cumulative distribution of the scores.

  Each point picks the token whose cumulative score is nearest. Several may
  fall on one token, so fewer than k may be picked; the result is a mask over
  the tokens. Adaptive Token Sampling (Fayyaz et al., 2022; checked against
  libs/models/transformers/ats_block.py).

  Args:
    score: non-negative, `[n]`.
    k: number of sample points (static).
    rule: "code" sorts ascending, min-max normalises the cumulative sum and
      spaces the points from its smallest non-zero value to 1; "paper" takes
      tokens in order and points (2i - 1) / 2k.
    mask: False excludes a token.
    count: number of points this example is entitled to, at most k.
  """
  if rule not in ("code", "paper"):
    raise ValueError(f"rule={rule!r}: must be 'code' or 'paper'")
  n = score.shape[0]
  mask = jnp.ones((n,), bool) if mask is None else mask
  count = k if count is None else count
  # Points beyond `count` repeat the last one and so pick nothing new.
  point = jnp.minimum(jnp.arange(k), count - 1)
  score = jnp.where(mask, score, 0.0)
  total = score.sum()
  score = jnp.where(total > 0, score / jnp.where(total > 0, total, 1), 1 / n)
  # Masked tokens come first, with zero mass.
  order = jnp.lexsort((score if rule == "code" else jnp.arange(n), mask))
  cdf, real = jnp.cumsum(score[order]), mask[order]
  if rule == "paper":
    points = (2 * point + 1) / (2 * count)
  else:
    low = jnp.where(real, cdf, jnp.inf).min()
    span = cdf[-1] - low
    cdf = jnp.where(span > 0, (cdf - low) / jnp.where(span > 0, span, 1), 1.0)
    start = jnp.where(real & (cdf > 0), cdf, jnp.inf).min()
    points = start + (1 - start) * point / jnp.maximum(count - 1, 1)
  gap = jnp.abs(points[:, None] - cdf[None, :])
  pick = jnp.argmin(jnp.where(real[None, :], gap, jnp.inf), axis=-1)
  return jnp.zeros((n,), bool).at[order[pick]].set(True) & mask

@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_indices(values: Float[Array, "*b n"], k: int) -> Int[Array, "*b k"]:
  """Indices of the k largest along the last axis; ties: the lower one first.

  `lax.top_k(values, k)[1]`, which inserts no collective when leading or
  vmapped axes are sharded.

  Raises:
    ValueError: k is negative or more than n.
  """
  if not 0 <= k <= values.shape[-1]:
    raise ValueError(f"k={k}: must lie in 0..{values.shape[-1]}")
  return _of_rank(values.ndim, k)(values)


@top_indices.defjvp
def _no_gradient(k, primals, tangents):
  del tangents
  index = top_indices(primals[0], k)
  return index, jax.custom_derivatives.zero_from_primal(index)


@functools.cache
def _of_rank(rank: int, k: int):
  """For arrays of that rank; `vmap` adds an axis in front."""
  index = custom_vmap(_partitioned(rank, k) if rank > 1 else _local(k))

  @index.def_vmap
  def _(size, batched, values):
    del size, batched
    return _of_rank(rank + 1, k)(values), True

  return index


def _local(k: int):
  return lambda values: jax.lax.top_k(values, k)[1]


def _partitioned(rank: int, k: int):
  """Each device ranks its own rows.

  XLA gathers a sharded batch before `lax.top_k`, because its partitioner does
  not know that rows are independent; a sort does not, but is slower. Here the
  partitioner is told.
  """
  index = custom_partitioning(_local(k))

  def partition(mesh, args, result):
    del args
    rows = tuple(result.sharding.spec)[: rank - 1]
    whole = NamedSharding(mesh, PartitionSpec(*rows))
    return mesh, _local(k), whole, (whole,)

  rows = " ".join(string.ascii_lowercase[: rank - 1])
  index.def_partition(
    partition=partition,
    sharding_rule=f"{rows} source -> {rows} chosen",
    need_replication_factors=("source", "chosen"),
  )
  return index
