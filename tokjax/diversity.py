"""Which tokens are unlike each other: greedy selections by a map `[n, n]`.

Selections that pick one token a step run k steps over arrays of n. Shapes are
those of one example; lift them with `jax.vmap`. Ties go to the lower index.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from tokjax import selection
from tokjax.selection import Selection

# What a squared length is held above, so that roots and quotients are finite.
TINY = 1e-12
# A squared length that fell to this part of its first value is rounding.
ROUNDING = 1e-5


def nearest_other(
  distance: Float[Array, "n n"], mask: Bool[Array, "n"] | None = None
) -> Float[Array, "n"]:
  """The second smallest distance to a token; the smallest is that to itself.

  Without a sort, which for 576 tokens took a CPU as long as a twentieth of an
  encoder of two blocks.

  Args:
    distance: between tokens; of one token alone it is the answer.
    mask: tokens that are False are near to none.
  """
  if mask is not None:
    distance = jnp.where(mask[:, None], distance, jnp.inf)
  if len(distance) == 1:
    return distance[0]
  nearest = jnp.arange(len(distance))[:, None] == distance.argmin(axis=0)[None]
  return jnp.where(nearest, jnp.inf, distance).min(axis=0)


def max_min(
  distance: Float[Array, "n n"],
  k: int,
  *,
  first: Float[Array, "n"],
  over: Literal["nearest", "all"] = "nearest",
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Selection:
  """Farthest points: adds the token whose nearest picked one is farthest.

  Args:
    distance: between tokens.
    k: how many (static), at most n; they come in the order of picking.
    first: the token with the largest value is picked first.
    over: "all": adds the token that is farthest from all picked ones in sum.
    mask: False excludes a token.
    count: how many of the k this example may keep (traced); default all.
  """
  n = distance.shape[0]
  free = jnp.ones((n,), bool) if mask is None else mask
  join = {"nearest": jnp.minimum, "all": jnp.add}[over]

  def step(i, state):
    picked, free, apart = state
    j = jnp.argmax(jnp.where(free, apart, -jnp.inf))
    picked, real = picked.at[i].set(j.astype(jnp.int32)), free[j]
    free = free.at[j].set(False)
    # Behind the first pick `first` is replaced, not compared.
    seen = jnp.where(i == 0, distance[j], join(apart, distance[j]))
    return picked, free, jnp.where(real, seen, apart)

  start = (jnp.zeros((k,), jnp.int32), free, first.astype(distance.dtype))
  picked, _, _ = jax.lax.fori_loop(0, k, step, start)
  return _selection(picked, k, mask, count)


def determinantal(
  kernel: Float[Array, "n n"],
  k: int,
  *,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Selection:
  """Greedy maximum of the determinant of the kernel among the picked.

  The fast greedy algorithm of Chen et al. (2018): each step orthogonalises
  against one more picked token.

  Args:
    kernel: symmetric, positive semi-definite. Beyond its rank the tokens left
      are picked in their order.
    k, mask, count: see `max_min`.
  """
  n = kernel.shape[0]
  kernel = kernel.astype(jnp.float32)
  free = jnp.ones((n,), bool) if mask is None else mask

  def step(i, state):
    picked, free, rows, left = state
    j = jnp.argmax(jnp.where(free, left, -jnp.inf))
    picked = picked.at[i].set(j.astype(jnp.int32))
    root = jnp.sqrt(jnp.maximum(left[j], TINY))
    row = (kernel[j] - rows[:, j] @ rows) / root
    row = jnp.where(left[j] > TINY, row, 0.0)
    left = left - jnp.square(row)
    # Beyond the rank of the kernel rounding must not choose.
    left = jnp.where(left > ROUNDING * first, left, 0.0)
    return picked, free.at[j].set(False), rows.at[i].set(row), left

  first = jnp.diagonal(kernel)
  rows = jnp.zeros((k, n), jnp.float32)
  start = (jnp.zeros((k,), jnp.int32), free, rows, first)
  picked, *_ = jax.lax.fori_loop(0, k, step, start)
  return _selection(picked, k, mask, count)


def coverage(
  worth: Float[Array, "r n"],
  k: int,
  *,
  weight: Float[Array, "n"] | None = None,
  bonus: Float[Array, "n"] | None = None,
  group: Int[Array, "n"] | None = None,
  most: Int[Array, "n"] | None = None,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Selection:
  """Facility location: adds the token that raises what is covered most.

  A row is covered as well as the best of the picked tokens covers it, and not
  below 0; the sum over rows is raised. Without weights the greedy solution is
  within 1 - 1/e of the best one.

  Args:
    worth: how well each token covers each row.
    weight: what a token raises is multiplied by this; None: 1.
    bonus: what a token is worth besides; None: 0.
    group, most: groups of tokens, and how many of its group each token may be
      among; `count` is then at most their sum. None: no limits.
    k, mask, count: see `max_min`.
  """
  n = worth.shape[1]
  worth = worth.astype(jnp.float32)
  free = jnp.ones((n,), bool) if mask is None else mask

  def step(i, state):
    picked, free, covered, room = state
    gain = jnp.maximum(worth - covered[:, None], 0.0).sum(axis=0)
    gain = gain if weight is None else gain * weight
    gain = gain if bonus is None else gain + bonus
    j = jnp.argmax(jnp.where(free & (room > 0), gain, -jnp.inf))
    picked = picked.at[i].set(j.astype(jnp.int32))
    covered = jnp.maximum(covered, worth[:, j])
    if group is not None:
      room = room - (group == group[j])
    return picked, free.at[j].set(False), covered, room

  room = jnp.ones((n,), jnp.int32) if most is None else most
  rows = jnp.zeros(worth.shape[:1])
  start = (jnp.zeros((k,), jnp.int32), free, rows, room)
  picked, *_ = jax.lax.fori_loop(0, k, step, start)
  return _selection(picked, k, mask, count)


def distinct(
  similarity: Float[Array, "n n"],
  k: int,
  *,
  order: Num[Array, "n"],
  step: int = 8,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Bool[Array, "n"]:
  """What remains where tokens with a near duplicate go, some at a time.

  In each round every second token of a list, the first included, is compared
  with all others in between, and the `step` tokens with the most similar one
  go. Those of the compared tokens that remain lead the next list, most similar
  first, and the others follow in their order. VisPruner (Zhang et al., 2024).

  Args:
    similarity: between tokens.
    k: how many remain (static).
    order: tokens are listed in ascending order of this at first.
    step: how many go in a round, half of the list at most.
    mask: False excludes a token.
    count: how many of the k remain in this example (traced); default all.

  Returns:
    True for tokens that remain, all if they are fewer than asked for.
  """
  n = similarity.shape[0]
  alive = jnp.ones((n,), bool) if mask is None else mask
  few = k if count is None else count

  def round_(_, state):
    alive, order = state
    left = alive.sum(dtype=jnp.int32)
    index = jnp.lexsort((order, ~alive))
    place = jnp.zeros_like(index).at[index].set(jnp.arange(n))
    compared = alive & (place % 2 == 0)
    others = alive & (place % 2 == 1)
    nearest = jnp.where(others[None], similarity, -jnp.inf).max(axis=1)
    rank = selection.places(nearest, mask=compared)
    go = jnp.minimum(jnp.minimum(step, left - few), (left + 1) // 2)
    alive = alive & ~(compared & (rank < go))
    return alive, jnp.where(compared, rank, n + place).astype(jnp.int32)

  place = jnp.arange(n, dtype=jnp.int32)
  order = jnp.zeros((n,), jnp.int32).at[jnp.argsort(order)].set(place)
  rounds = _rounds(n, k if count is None else 1, step)
  return jax.lax.fori_loop(0, rounds, round_, (alive, order))[0]


def _rounds(left: int, few: int, step: int) -> int:
  """Rounds of `distinct` from `left` tokens to `few`, or from fewer tokens."""
  rounds = 0
  while left > few:
    left -= min(step, left - few, (left + 1) // 2)
    rounds += 1
  return rounds


def _selection(picked, k: int, mask, count) -> Selection:
  if mask is None and count is None:
    return Selection(picked, None)
  real = jnp.int32(k) if mask is None else mask.sum(dtype=jnp.int32)
  most = real if count is None else jnp.minimum(real, count)
  return Selection(picked, jnp.arange(k) < most)
