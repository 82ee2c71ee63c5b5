"""Builds layouts from block scores: top-k, top-p mass or threshold.

A rule is a frozen dataclass, so it can be static in a jit. All three keep the
highest scores first (ties: the earlier block) in lists of a static capacity.
"""

import dataclasses

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.layout import patterns, types
from pallas_kernels.layout.types import BlockLayout

FULL = patterns.Full()


@dataclasses.dataclass(frozen=True)
class TopK:
  """The `k` highest-scoring blocks of each query block."""

  k: int

  def capacity_of(self, n: int) -> int:
    return min(self.k, n)

  def chosen(
    self, ranked: Float[Array, "*s c"], scores: Float[Array, "*s n"]
  ) -> Bool[Array, "*s c"]:
    """Which of the ranked blocks stay; all scores are given for their sum."""
    del scores
    return jnp.ones(ranked.shape, bool)

  def wanted(self, scores: Float[Array, "*s n"]) -> Int32[Array, "*s"]:
    """How many blocks the rule asks for, before capacity."""
    there = jnp.sum(scores > -jnp.inf, axis=-1, dtype=jnp.int32)
    return jnp.minimum(there, self.k)


@dataclasses.dataclass(frozen=True)
class TopP:
  """The fewest blocks whose scores reach the share `p` of the row's sum.

  Scores are masses: non-negative (negative ones count as 0 mass), such as an
  estimated softmax summed over blocks. At least one block stays.
  """

  p: float
  capacity: int | None = None

  def capacity_of(self, n: int) -> int:
    return n if self.capacity is None else min(self.capacity, n)

  def chosen(
    self, ranked: Float[Array, "*s c"], scores: Float[Array, "*s n"]
  ) -> Bool[Array, "*s c"]:
    mass = _mass(ranked)
    total = jnp.sum(_mass(scores), axis=-1, keepdims=True)
    before = jnp.cumsum(mass, axis=-1) - mass
    first = jnp.arange(ranked.shape[-1]) == 0
    first = jnp.expand_dims(first, tuple(range(ranked.ndim - 1)))
    # Blocks that are always kept have an infinite score and no mass.
    kept = ranked == jnp.inf
    return (before < self.p * total) | first | kept

  def wanted(self, scores: Float[Array, "*s n"]) -> Int32[Array, "*s"]:
    ranked = -jnp.sort(-scores, axis=-1)
    chosen = self.chosen(ranked, scores) & (ranked > -jnp.inf)
    return jnp.sum(chosen, axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Threshold:
  """Blocks that score at least `value`."""

  value: float
  capacity: int | None = None

  def capacity_of(self, n: int) -> int:
    return n if self.capacity is None else min(self.capacity, n)

  def chosen(
    self, ranked: Float[Array, "*s c"], scores: Float[Array, "*s n"]
  ) -> Bool[Array, "*s c"]:
    del scores
    return ranked >= self.value

  def wanted(self, scores: Float[Array, "*s n"]) -> Int32[Array, "*s"]:
    return jnp.sum(scores >= self.value, axis=-1, dtype=jnp.int32)


def _mass(scores):
  return jnp.maximum(jnp.where(jnp.isfinite(scores), scores, 0), 0)


def from_scores(
  scores: Float[Array, "*lead l i j"],
  rule: TopK | TopP | Threshold,
  *,
  q_len: int,
  k_len: int | None = None,
  block_q: int = 128,
  block_k: int = 128,
  pattern: patterns.Pattern = FULL,
  keep: patterns.Pattern | None = None,
) -> BlockLayout:
  """Builds a layout from block scores, inside jit, without a host sync.

  Args:
    scores: `[*lead, L, q blocks, k blocks]`; a higher one matters more. NaN
      and -inf are never chosen.
    rule: `TopK`, `TopP` or `Threshold`.
    q_len, k_len: lengths in tokens; `k_len` defaults to `q_len`.
    block_q, block_k: block sizes in tokens.
    pattern: nothing outside it is chosen or attended, e.g. `Causal()`.
    keep: a pattern whose blocks are always chosen where `pattern` allows it,
      e.g. `Sinks(128) | Window(128)`. They come first and use up capacity.

  Returns:
    A BlockLayout whose lists have at most the rule's capacity.

  Raises:
    ValueError: if the shape of `scores` does not fit the lengths.
  """
  k_len = q_len if k_len is None else k_len
  kinds = patterns.block_kinds(pattern, block_q, block_k, q_len, k_len)
  if scores.ndim < 3 or scores.shape[-2:] != kinds.shape[-2:]:
    raise ValueError(
      f"scores have shape {scores.shape}; for q_len={q_len}, k_len={k_len} "
      f"and blocks of {block_q} x {block_k} they must be [..., heads, "
      f"{kinds.shape[-2]}, {kinds.shape[-1]}]"
    )
  if k_len % block_k:
    kinds[..., -1] = np.minimum(kinds[..., -1], 1)
  scores = lax.stop_gradient(scores)
  heads = np.broadcast_shapes(scores.shape[-3:], kinds.shape)[0]
  scores = jnp.broadcast_to(
    scores, scores.shape[:-3] + (heads,) + scores.shape[-2:]
  )
  lift = lambda x: jnp.broadcast_to(
    jnp.expand_dims(x, tuple(range(scores.ndim - 3))), scores.shape
  )
  scores = jnp.where(lift(kinds > 0) & ~jnp.isnan(scores), scores, -jnp.inf)
  if keep is not None:
    kept = patterns.block_kinds(keep, block_q, block_k, q_len, k_len) > 0
    scores = jnp.where(lift(kept) & lift(kinds > 0), jnp.inf, scores)
  lists, dropped = _lists(scores, rule, lift(kinds), kinds)
  return types.BlockLayout(
    *lists,
    dropped,
    # There are four lists, which a checker cannot know.
    # pyrefly: ignore[bad-keyword-argument]
    block_q=block_q,
    block_k=block_k,
    q_len=q_len,
    k_len=k_len,
    mask_fn=None if pattern == patterns.Full() else pattern,
  )


def _lists(scores, rule, kinds, static_kinds):
  """Ranks, applies the rule, and splits into full and partial lists."""
  capacity = max(1, rule.capacity_of(scores.shape[-1]))
  ranked, index = jax.lax.top_k(scores, capacity)
  chosen = (ranked > -jnp.inf) & rule.chosen(ranked, scores)
  kind = jnp.take_along_axis(kinds, index, axis=-1)
  lists = []
  for wanted in (2, 1):
    longest = np.max(np.sum(static_kinds == wanted, axis=-1), initial=1)
    lists += _split(chosen & (kind == wanted), index, int(longest))
  listed = jnp.sum(lists[0] + lists[2], axis=-1)
  dropped = jnp.sum(rule.wanted(scores), axis=-1) - listed
  return lists, dropped


def _split(chosen, index, longest):
  """Compacts the chosen entries, ascending, to at most `longest`."""
  n = np.int32(np.iinfo(np.int32).max)
  ordered = jnp.sort(jnp.where(chosen, index, n), axis=-1)[..., :longest]
  count = jnp.sum(chosen, axis=-1, dtype=jnp.int32)
  return count, jnp.where(ordered == n, 0, ordered)
