"""Slow NumPy forms of the clustering rules, from cards and official code.

Hard rules return groups as in `reference_merging`, the centre first. Nothing
here imports tokjax.
"""

import math

import numpy as np

from tests.recipes.reference_merging import cosines


def distances(x):
  n = len(x)
  return np.array(
    [
      [math.sqrt(((x[i] - x[j]) ** 2).sum()) for j in range(n)]
      for i in range(n)
    ]
  )


def around(distance, centres):
  """Every token goes to its nearest centre, a centre to itself."""
  groups = {c: [c] for c in centres}
  for i in range(len(distance)):
    if i not in groups:
      groups[min(centres, key=lambda c: distance[i, c])].append(i)
  return [groups[c] for c in centres]


def dpc_knn(x, keep, k):
  n, width = x.shape
  d = distances(x) / math.sqrt(width)
  density = [
    math.exp(-sum(v**2 for v in sorted(d[i])[:k]) / k) for i in range(n)
  ]

  def denser(i):
    return [j for j in range(n) if (density[j], -j) > (density[i], -i)]

  gap = [min((d[i, j] for j in denser(i)), default=d.max()) for i in range(n)]
  peak = [p * g for p, g in zip(density, gap, strict=True)]
  centres = sorted(range(n), key=lambda i: -peak[i])[:keep]
  return around(d, centres)


def farthest_first(x, keep):
  """Greedy k-centre from token 0."""
  d, chosen = distances(x), [0]
  while len(chosen) < keep:
    rest = [i for i in range(len(x)) if i not in chosen]
    chosen.append(max(rest, key=lambda i: min(d[i, c] for c in chosen)))
  return chosen


def kmedoids(x, medoids, weight, iterations, cost):
  """`cost`: "all" as in the repository, "members" as usual."""
  d, n = distances(x), len(x)
  for _ in range(iterations):
    moved = []
    for group in around(d, medoids):
      if cost == "all":
        price = {i: weight[i] * sum(d[i, j] for j in range(n)) for i in group}
      else:
        price = {i: sum(weight[j] * d[i, j] for j in group) for i in group}
      moved.append(min(sorted(group), key=lambda i: price[i]))
    medoids = moved
  return medoids


def agglomerative(x, keep, linkage):
  """The partition as a set of sets."""
  d = 1 - cosines(x)
  join = {"single": min, "complete": max, "average": np.mean}[linkage]
  clusters = [[i] for i in range(len(x))]
  while len(clusters) > keep:
    pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
    a, b = min(
      pairs,
      key=lambda p: join(
        [d[i, j] for i in clusters[p[0]] for j in clusters[p[1]]]
      ),
    )
    clusters[b] += clusters.pop(a)
  return {frozenset(c) for c in clusters}


def home(i, grid, cells):
  """Row and column of the cell of a token (nearest up-sampling)."""
  row, column = divmod(i, grid[1])
  return row * cells[0] // grid[0], column * cells[1] // grid[1]


def pooled(x, grid, cells):
  """Adaptive average pooling."""
  out = []
  for r in range(cells[0]):
    for c in range(cells[1]):
      rows = range(r * grid[0] // cells[0], -(-(r + 1) * grid[0] // cells[0]))
      columns = range(
        c * grid[1] // cells[1], -(-(c + 1) * grid[1] // cells[1])
      )
      out.append(
        np.mean([x[i * grid[1] + j] for i in rows for j in columns], 0)
      )
  return np.stack(out)


def soft_kmeans(x, grid, cells, iterations, tau, window):
  """Expedit's centres."""
  centre = pooled(x, grid, cells)
  for _ in range(iterations):
    q = np.zeros((len(centre), len(x)))
    for p in range(len(x)):
      for m in range(len(centre)):
        gap = np.subtract(home(p, grid, cells), divmod(m, cells[1]))
        if np.abs(gap).max() <= window // 2:
          q[m, p] = math.exp(-tau * ((x[p] - centre[m]) ** 2).sum())
    q /= q.sum(0, keepdims=True)
    centre = (q @ x) / q.sum(1, keepdims=True)
  return centre


def reconstruction(x, centre, tau, neighbours, norm):
  """Weights of the nearest centres; `norm` is the order of the row's norm."""
  out = np.zeros((len(x), len(centre)))
  for p in range(len(x)):
    w = np.array([math.exp(-tau * ((x[p] - c) ** 2).sum()) for c in centre])
    bound = sorted(w)[-min(neighbours, len(w))]
    w = np.where(w >= bound, w, 0.0)
    out[p] = w / np.linalg.norm(w, ord=norm)
  return out


def token_transforming(keys, anchors, temperature):
  """Membership C `[m, n]`: columns sum to one."""
  similar = cosines(keys)
  out = np.zeros((len(anchors), len(keys)))
  for j in range(len(keys)):
    e = np.array([math.exp(similar[a, j] / temperature) for a in anchors])
    out[:, j] = e / e.sum()
  return out
