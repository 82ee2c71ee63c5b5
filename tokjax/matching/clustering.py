"""Clustering: any number of tokens may become one."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax import scores, selection
from tokjax.plan import Assignment
from tokjax.selection import top_indices

FAR = jnp.inf


def _distances(features, mask):
  """Euclidean distances `[n, n]`; those of padded tokens are infinite."""
  d = jnp.sqrt(scores.squared_distance(features, features))
  # Rounding must not put a token at a distance from itself.
  d = jnp.where(jnp.eye(d.shape[0], dtype=bool), 0.0, d)
  if mask is not None:
    d = jnp.where(mask[:, None] & mask[None, :], d, FAR)
  return jax.lax.stop_gradient(d)


def _nearest(distance, centre, used):
  """Label of the nearest used centre; a centre has its own, `[n]`."""
  to_centre = jnp.where(used[:, None], distance[centre], FAR)
  # Two centres may coincide; each must keep itself.
  own = jnp.where(used, centre, distance.shape[0])
  _, label = selection.first_max(-to_centre, axis=0)
  return label.at[own].set(jnp.arange(centre.shape[0]), mode="drop")


def _around(distance, centre, used, mask) -> Assignment:
  """Tokens join their nearest centre; outputs stand in the centres' order."""
  (n, _), (keep,) = distance.shape, centre.shape
  own = jnp.where(used, centre, n)
  order = jnp.arange(n).at[own].set(jnp.arange(keep), mode="drop")
  parent = centre[_nearest(distance, centre, used)]
  return Assignment.from_parent(parent, keep, order=order, mask=mask)


def _used(centre, mask, count):
  """Which of the centres an example is entitled to."""
  used = jnp.ones(centre.shape, bool) if mask is None else mask[centre]
  if count is None and mask is not None:
    count = mask.sum()
  return used if count is None else used & (jnp.arange(len(centre)) < count)


def _check_keep(keep: int, n: int) -> None:
  if not 1 <= keep <= n:
    raise ValueError(f"keep={keep}: must lie in 1..{n}")


def dpc_knn(
  features: Float[Array, "n d"],
  keep: int,
  *,
  neighbours: int | None = 5,
  key: PRNGKeyArray | None = None,
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Assignment:
  """Density peaks: centres are dense and far from anything denser.

  As in TCFormer (Zeng et al., 2022; checked against TokenReduction's
  models/dpcknn.py). Outputs are numbered by descending density x distance.

  Args:
    features: `[n, d]`.
    keep: number of clusters (static).
    neighbours: how many nearest tokens, itself included, make the density;
      None: as many as there are clusters (SparseVLM).
    key: adds noise of up to 1e-6 to the density as the official code does;
      without it, of two equally dense tokens the one of lower index counts as
      denser.
    mask: padded tokens are in no cluster.
    count: clusters this example may have, at most `keep`.
  """
  n, width = features.shape
  _check_keep(keep, n)
  distance = _distances(features, mask) / jnp.sqrt(1.0 * width)
  finite = jnp.where(jnp.isfinite(distance), distance, 0.0)
  most = keep if neighbours is None else min(neighbours, n)
  nearest = top_indices(-distance, most)
  near = jnp.take_along_axis(distance, nearest, axis=-1)
  found = jnp.isfinite(near)
  if neighbours is None and count is not None:
    found &= (jnp.arange(most) < count)[None, :]
  square = jnp.square(jnp.where(found, near, 0.0)).sum(axis=-1)
  density = jnp.exp(-square / jnp.maximum(found.sum(axis=-1), 1))
  if key is not None:
    density = density + 1e-6 * jax.random.uniform(key, (n,))
  earlier = jnp.arange(n)[None, :] < jnp.arange(n)[:, None]
  denser = density[None, :] > density[:, None]
  denser |= (density[None, :] == density[:, None]) & earlier
  gap = jnp.where(denser, distance, FAR).min(axis=-1)
  peak = density * jnp.where(jnp.isfinite(gap), gap, finite.max())
  if mask is not None:
    peak = jnp.where(mask, peak, -1.0)
  centre = top_indices(peak, keep)
  return _around(distance, centre, _used(centre, mask, count), mask)


def kmedoids(
  features: Float[Array, "n d"],
  keep: int,
  *,
  weight: Float[Array, "n"] | None = None,
  iterations: int = 3,
  cost: Literal["all", "members"] = "members",
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Assignment:
  """k-medoids with Voronoi iterations.

  Args:
    features: `[n, d]`.
    keep: number of clusters (static).
    weight: importance; the `keep` largest are the first medoids. Without it
      the first token is, then greedily the one farthest from all so far.
    iterations: how often medoids are moved and tokens assigned again.
    cost: what a medoid of a cluster minimises. "members": the weighted sum of
      distances to the members. "all": as TokenReduction's models/kmedoids.py
      does, its own weight times the distances to all tokens.
    mask: padded tokens are in no cluster.
    count: clusters this example may have, at most `keep`.
  """
  _check_keep(keep, features.shape[0])
  if cost not in ("all", "members"):
    raise ValueError(f"cost={cost!r}: must be 'all' or 'members'")
  distance = _distances(features, mask)
  finite = jnp.where(jnp.isfinite(distance), distance, 0.0)
  if weight is None:
    centre = _farthest_first(distance, keep, mask)
    weight = jnp.ones(features.shape[:1], features.dtype)
  else:
    weight = jax.lax.stop_gradient(weight)
    ranked = weight if mask is None else jnp.where(mask, weight, -FAR)
    centre = top_indices(ranked, keep)
  used = _used(centre, mask, count)

  def step(_, centre):
    label = _nearest(distance, centre, used)
    if cost == "all":
      price = weight * finite.sum(axis=-1)
    else:
      same = label[:, None] == label[None, :]
      price = jnp.where(same, finite * weight[None, :], 0.0).sum(axis=-1)
    if mask is not None:
      price = jnp.where(mask, price, FAR)
    member = label[None, :] == jnp.arange(keep)[:, None]
    cheap = jnp.where(member, -price[None, :], -FAR)
    _, moved = selection.first_max(cheap, axis=-1)
    return jnp.where(used, moved, centre)

  centre = jax.lax.fori_loop(0, iterations, step, centre)
  return _around(distance, centre, used, mask)


def _farthest_first(distance, keep, mask):
  """Greedy k-centre: each next token is the one farthest from all before."""
  reach = jnp.where(jnp.isfinite(distance), distance, -FAR)
  first = jnp.array(0) if mask is None else jnp.argmax(mask)

  def step(i, state):
    centre, gap = state
    pick = jnp.argmax(gap)
    gap = jnp.minimum(gap, reach[pick]).at[pick].set(-FAR)
    return centre.at[i].set(pick), gap

  gap = reach[first].at[first].set(-FAR)
  centre = jnp.zeros((keep,), jnp.int32).at[0].set(first)
  return jax.lax.fori_loop(1, keep, step, (centre, gap))[0]


def agglomerative(
  features: Float[Array, "n d"],
  keep: int,
  *,
  linkage: Literal["single", "complete", "average"] = "average",
  mask: Bool[Array, "n"] | None = None,
  count: Int[Array, ""] | None = None,
) -> Assignment:
  """Joins the two closest clusters until `keep` are left.

  Distance is 1 - cosine. ATC (Haurum et al., 2024; checked against
  ATC_setup/models/atc.py, which calls scikit-learn). Clusters stand in the
  order of their first member; ties go to the lowest pair of indices.

  Args:
    features: `[n, d]`.
    keep: number of clusters (static).
    linkage: distance of two clusters: the smallest, largest or mean distance
      of their members.
    mask: padded tokens are in no cluster.
    count: clusters this example may have, at most `keep`.
  """
  n = features.shape[0]
  _check_keep(keep, n)
  if linkage not in ("single", "complete", "average"):
    raise ValueError(
      f"linkage={linkage!r}: must be 'single', 'complete' or 'average'"
    )
  distance = jax.lax.stop_gradient(1.0 - scores.cosine(features, features))
  apart = ~jnp.eye(n, dtype=bool)
  if mask is not None:
    apart &= mask[:, None] & mask[None, :]
  distance = jnp.where(apart, distance, FAR)
  due = n - keep
  if count is not None:
    due = (n if mask is None else mask.sum()) - count

  def join(t, state):
    distance, parent, size = state
    # The row minima first: an argmin over all pairs takes forty times longer.
    i = jnp.argmin(distance.min(axis=1))
    j = jnp.argmin(distance[i])
    i, j = jnp.minimum(i, j), jnp.maximum(i, j)
    # There is no j where no pair is left or this example has joined enough.
    j = jnp.where((t < due) & (distance[i, j] < FAR), j, n)
    a, b = distance[i], distance.at[j].get(mode="fill", fill_value=0)
    row = {
      "single": jnp.minimum(a, b),
      "complete": jnp.maximum(a, b),
      "average": (size[i] * a + size[j] * b) / (size[i] + size[j]),
    }[linkage]
    row = jnp.where(jnp.isinf(a) | jnp.isinf(b), FAR, row)
    row = jnp.where(j < n, row, a)
    distance = distance.at[i].set(row).at[:, i].set(row)
    distance = distance.at[j].set(FAR, mode="drop")
    distance = distance.at[:, j].set(FAR, mode="drop")
    parent = jnp.where(parent == j, i, parent)
    size = size.at[i].add(size.at[j].get(mode="fill", fill_value=0))
    return distance, parent, size

  start = (distance, jnp.arange(n), jnp.ones((n,), distance.dtype))
  _, parent, _ = jax.lax.fori_loop(0, n - keep, join, start)
  return Assignment.from_parent(parent, keep, mask=mask)
