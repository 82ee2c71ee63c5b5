"""Bipartite matching: sources join their most similar target.

ToMe, tomesd, PiToMe, MCTF and FastVGGT differ in who is a source, who is a
target and what "similar" means; the matching itself is `bipartite`.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax import scores, selection
from tokjax.plan import Assignment
from tokjax.selection import top_indices


class Sides(NamedTuple):
  """Indices of the tokens that may be merged away, and of those they join."""

  source: Int[Array, "a"]
  target: Int[Array, "b"]


def parity(
  n: int,
  *,
  first: Literal["source", "target"] = "source",
  mask: Bool[Array, "n"] | None = None,
  order: Int[Array, "n"] | None = None,
) -> Sides:
  """Sources and targets alternate.

  Args:
    n: number of tokens.
    first: which side the first token is on.
    mask: padded tokens are counted after the real ones, so that the split of
      an example does not depend on its padding.
    order: alternate in this order of indices instead of the given one.
  """
  if order is None:
    order = jnp.arange(n)
    if mask is not None:
      order = selection.partition(mask).index
  even, odd = order[0::2], order[1::2]
  return Sides(even, odd) if first == "source" else Sides(odd, even)


def split(
  is_target: Bool[Array, "n"],
  targets: int,
  *,
  mask: Bool[Array, "n"] | None = None,
) -> Sides:
  """Sides from a mask of at most `targets` (static) targets, by index.

  Where an example has fewer, padded tokens fill the list of targets.
  """
  tier = jnp.where(is_target, 0, 2)
  if mask is not None:
    tier = jnp.where(mask, tier, 1)
  order = jnp.argsort(tier, stable=True)
  return Sides(order[targets:], order[:targets])


def every_kth(
  n: int,
  keep: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Sides:
  """`keep` evenly spaced targets, each the last of its group.

  For n = k * keep these are the targets of ToMe's kth variant (k = n / keep).
  The official function drops a tail of n mod k tokens; here nothing is lost.
  """
  if not 1 <= keep <= n:
    raise ValueError(f"keep={keep}: must lie in 1..{n}")
  rank, total, wanted = jnp.arange(n), n, keep if count is None else count
  if mask is not None:
    rank, total = jnp.cumsum(mask) - 1, jnp.maximum(mask.sum(), 1)
  is_target = (rank + 1) * wanted // total > rank * wanted // total
  return split(is_target if mask is None else is_target & mask, keep, mask=mask)


def at_random(
  key: PRNGKeyArray,
  n: int,
  keep: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Sides:
  """`keep` random targets (ToMe's random variant)."""
  chosen = selection.top_k(scores.random(key, n), keep, mask=mask, count=count)
  valid = True if chosen.valid is None else chosen.valid
  is_target = jnp.zeros((n,), bool).at[chosen.index].set(valid)
  return split(is_target, keep, mask=mask)


def grid_cells(
  grid: tuple[int, ...],
  cell: tuple[int, ...],
  *,
  key: PRNGKeyArray | None = None,
) -> Sides:
  """One target in every cell of a grid, the other tokens are sources.

  tomesd's partition (checked against tomesd/merge.py). Without a key the
  target is the first token of its cell. What is outside a whole cell is all
  sources. Grids and cells have any rank: rows and columns, frames before them.

  Raises:
    ValueError: a cell of another rank, or larger than the grid.
  """
  fits = len(cell) == len(grid)
  if not (fits and all(1 <= c <= g for c, g in zip(cell, grid, strict=True))):
    raise ValueError(f"cell={cell}: must fit into the grid {grid}")
  cells = tuple(g // c for g, c in zip(grid, cell, strict=True))
  pick = jnp.zeros(cells, jnp.int32)
  if key is not None:
    pick = jax.random.randint(key, cells, 0, math.prod(cell))
  place = jnp.zeros(cells, jnp.int32)
  for axis, inside in enumerate(jnp.unravel_index(pick, cell)):
    start = jax.lax.broadcasted_iota(jnp.int32, cells, axis) * cell[axis]
    place = place * grid[axis] + start + inside
  is_target = jnp.zeros((math.prod(grid),), bool)
  is_target = is_target.at[place.reshape(-1)].set(True)
  return split(is_target, math.prod(cells))


def bipartite(
  similarity: Float[Array, "a b"],
  sides: Sides,
  n: int,
  remove: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
  unmerged: Literal["index", "similarity"] = "index",
  kept: Int[Array, "p"] | None = None,
  above: Float[Array, ""] | float | None = None,
) -> Assignment:
  """Merges the `remove` best edges; each source has one edge, its best.

  ToMe's soft matching (Bolya et al., 2023; checked against tome/merge.py).
  Output order: kept, unmerged sources, targets.

  Args:
    similarity: of sources (rows) and targets (columns).
    sides: indices of the a sources and b targets.
    n: number of tokens, a + b + p.
    remove: how many sources merge (static), at most a.
    mask: padded tokens are not matched.
    count: outputs this example may keep; merges beyond that do not happen.
    unmerged: order of the sources that stay: by index, or by descending
      similarity as in the official code without a class token.
    kept: tokens that take no part; they come first.
    above: edges that are better than this merge too, up to half of the tokens;
      outputs that are left over are padding.

  Returns:
    A plan with n - remove outputs.

  Raises:
    ValueError: more is to be removed than there are sources.
  """
  source, target = sides
  a, b = similarity.shape
  if not 0 <= remove <= a:
    raise ValueError(
      f"remove={remove}: only {a} of {n} tokens are sources that can merge"
    )
  best, to, rank = best_edges(similarity, sides, mask)
  merged, stay = rank[:remove], rank[remove:]
  if mask is None and count is None and above is None:
    stay = jnp.sort(stay) if unmerged == "index" else stay
    first = source[stay] if kept is None else jnp.append(kept, source[stay])
    return Assignment(
      anchor=jnp.concatenate([first, target]),
      rest=source[merged],
      into=first.shape[0] + to[merged],
      num_sources=n,
    )
  place = jnp.zeros((a,), rank.dtype).at[rank].set(jnp.arange(a))
  joins = place < _merges(remove, count, mask, n)
  if above is not None:
    half = (n if mask is None else mask.sum()) // 2
    joins = joins | ((best > above) & (place < half))
  joins = joins & (best > -jnp.inf)
  parent = jnp.arange(n).at[source].set(jnp.where(joins, target[to], source))
  first = jnp.arange(a) if unmerged == "index" else place
  order = _output_order(n, sides, first, jnp.arange(b), kept)
  fixed = above is None
  return Assignment.from_parent(
    parent, n - remove, order=order, mask=mask, full=fixed, exact=fixed
  )


def bidirectional(
  similarity: Float[Array, "a b"],
  sides: Sides,
  n: int,
  remove: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
  unmerged: Literal["index", "similarity"] = "index",
) -> Assignment:
  """Half of the merges go from sources to targets, the other half back.

  First the remove // 2 best edges source -> target; then, among the sources
  that are left, remove - remove // 2 targets (with all that joined them) join
  theirs. MCTF (Lee et al., 2024; checked against utils/mctf.py). Output order:
  unmerged sources, then remaining targets by descending similarity.

  Args and errors: as in `bipartite`.
  """
  source, target = sides
  a, b = similarity.shape
  forth, back = remove // 2, remove - remove // 2
  if remove < 0 or forth >= a or back > b:
    raise ValueError(
      f"remove={remove}: at most {min(2 * a - 1, 2 * b)} of {n} tokens merge"
    )
  best, to, rank = best_edges(similarity, sides, mask)
  if mask is None and count is None:
    merged, stay = rank[:forth], rank[forth:]
    stay = jnp.sort(stay) if unmerged == "index" else stay
    _, home, rank = best_edges(similarity[stay].T, sides, None)
    # Where each target ends: in its source's output, or in one of its own.
    ends = jnp.append(home[rank[:back]], a - forth + jnp.arange(b - back))
    end = jnp.zeros((b,), ends.dtype).at[rank].set(ends)
    return Assignment(
      anchor=jnp.append(source[stay], target[rank[back:]]),
      rest=jnp.append(source[merged], target[rank[:back]]),
      into=jnp.append(end[to[merged]], ends[:back]),
      num_sources=n,
    )
  limit = _merges(remove, count, mask, n)
  place = jnp.zeros((a,), rank.dtype).at[rank].set(jnp.arange(a))
  gone = (place < limit // 2) & (best > -jnp.inf)
  parent = jnp.arange(n).at[source].set(jnp.where(gone, target[to], source))

  left = jnp.where(gone[:, None], -jnp.inf, similarity)
  best, to, rank = best_edges(left.T, Sides(target, source), mask)
  second = jnp.zeros((b,), rank.dtype).at[rank].set(jnp.arange(b))
  gone = (second < limit - limit // 2) & (best > -jnp.inf)
  parent = parent.at[target].set(jnp.where(gone, source[to], target))
  first = jnp.arange(a) if unmerged == "index" else place
  order = _output_order(n, sides, first, second, None)
  # A source may have joined a target that has joined another source since.
  return Assignment.from_parent(
    parent[parent], n - remove, order=order, mask=mask
  )


def best_edges(
  similarity: Float[Array, "a b"], sides: Sides, mask: Bool[Array, "n"] | None
) -> tuple[Float[Array, "a"], Int[Array, "a"], Int[Array, "a"]]:
  """Every source's best value and target, and the sources by descending value.

  Minus infinity where a source or all targets are not real, as `mask` says.
  Nothing is learned through a matching: its gradient is zero.
  """
  if mask is not None:
    real = mask[sides.source][:, None] & mask[sides.target][None, :]
    similarity = jnp.where(real, similarity, -jnp.inf)
  similarity = jax.lax.stop_gradient(similarity)
  best, to = selection.first_max(similarity, axis=-1)
  rank = top_indices(best, best.shape[0])
  return best, to, rank


def _merges(remove: int, count, mask, n: int):
  """How many merges an example is due: `remove` at most."""
  if count is None:
    return remove
  real = n if mask is None else mask.sum()
  return jnp.clip(real - count, 0, remove)


def _output_order(n: int, sides: Sides, first, second, kept):
  """Sort keys that put kept before sources before targets."""
  order = jnp.arange(n)
  order = order.at[sides.source].set(n + first)
  order = order.at[sides.target].set(2 * n + second)
  if kept is not None:
    order = order.at[kept].set(jnp.arange(kept.shape[0]))
  return order
