"""Slow NumPy forms of the merging rules, written from cards and official code.

A rule returns groups: for every output, in order, the list of the tokens that
become it. Nothing here imports tokjax.
"""

import math

import numpy as np


def cosines(x):
  """Cosine similarity of all pairs, `[n, n]`."""
  n = len(x)
  out = np.zeros((n, n))
  for i in range(n):
    for j in range(n):
      norm = math.sqrt((x[i] @ x[i]) * (x[j] @ x[j]))
      out[i, j] = x[i] @ x[j] / norm
  return out


def best(similar, source, target):
  """The most similar target of every source; of equals the first."""
  return {i: max(target, key=lambda j: similar[i, j]) for i in source}


def fold(similar, source, target, remove, by_index):
  """The `remove` best edges merge: unmerged sources, then targets."""
  to = best(similar, source, target)
  order = sorted(source, key=lambda i: -similar[i, to[i]])
  gone, stay = order[:remove], order[remove:]
  if by_index:
    stay = sorted(stay)
  merged = [[j] + [i for i in gone if to[i] == j] for j in target]
  return [[i] for i in stay] + merged


def sides(n, protected):
  """Unprotected tokens of even and of odd index in the whole sequence."""
  even = [i for i in range(0, n, 2) if i >= protected]
  return even, [i for i in range(1, n, 2) if i >= protected]


def tome(metric, remove, protected):
  even, odd = sides(len(metric), protected)
  front = [[i] for i in range(protected)]
  return front + fold(cosines(metric), even, odd, remove, protected > 0)


def tome_to(metric, target):
  """All other tokens join one of `target`."""
  source = [i for i in range(len(metric)) if i not in target]
  return fold(cosines(metric), source, target, len(source), True)


def cells(grid, cell):
  """The tokens of every whole cell, row by row."""
  (h, w), (sy, sx) = grid, cell
  return [
    [(r * sy + y) * w + c * sx + x for y in range(sy) for x in range(sx)]
    for r in range(h // sy)
    for c in range(w // sx)
  ]


def tomesd(x, target, remove):
  target = sorted(target)
  source = [i for i in range(len(x)) if i not in target]
  return fold(cosines(x), source, target, remove, False)


def energy(metric, margin, alpha=1.0):
  similar = cosines(metric)

  def elu(t):
    return t if t > 0 else alpha * (math.exp(t) - 1)

  return [
    sum(elu(s - margin) for s in similar[i]) / len(metric)
    for i in range(len(metric))
  ]


def pitome(metric, margin, remove, all_ranked):
  """Groups of patches; `all_ranked` is the variant called bsm."""
  similar, score = cosines(metric), energy(metric, margin)
  rank = sorted(range(len(metric)), key=lambda i: -score[i])
  if all_ranked:
    return fold(similar, rank[0::2], rank[1::2], remove, False)
  top, kept = rank[: 2 * remove], rank[2 * remove :]
  merged = fold(similar, top[0::2], top[1::2], remove, False)
  return [[i] for i in kept] + merged


def mctf_weights(x, received, size, temperatures):
  """The product of the three criteria for all pairs, `[n, n]`."""
  n = len(x)
  similar, information, small = temperatures
  u, z = 1 / np.array(received), 1 / np.array(size)
  u, z = u / u.max(), z / z.max()
  cos, out = cosines(x), np.ones((n, n))
  for i in range(n):
    for j in range(n):
      if similar:
        out[i, j] *= max((cos[i, j] + 1) / 2, 0) ** (1 / similar)
      if information:
        out[i, j] *= (u[i] * u[j]) ** (1 / information)
      if small:
        out[i, j] *= (z[i] * z[j]) ** (1 / small)
  return out


def mctf(weights, remove, protected):
  """First half of the merges even to odd, then odd to the even ones left."""
  even, odd = sides(len(weights), protected)
  forth = remove // 2
  groups = fold(weights, even, odd, forth, protected > 0)
  left = [g[0] for g in groups[: len(even) - forth]]
  members = {g[0]: g for g in groups}
  to = best(weights.T, odd, left)
  order = sorted(odd, key=lambda j: -weights[to[j], j])
  gone, stay = order[: remove - forth], order[remove - forth :]
  for j in gone:
    members[to[j]] = members[to[j]] + members[j]
  front = [[i] for i in range(protected)]
  return front + [members[i] for i in left] + [members[j] for j in stay]


def mean(groups, x, weight):
  """Members' weighted mean, `[m, d]`."""
  return np.stack(
    [
      sum(weight[i] * x[i] for i in g) / sum(weight[i] for i in g)
      for g in groups
    ]
  )


def total(groups, size):
  return np.array([sum(size[i] for i in g) for g in groups])


def restore(groups, values):
  """Every token gets a copy of its output."""
  out = np.zeros((sum(map(len, groups)), *values.shape[1:]))
  for value, group in zip(values, groups, strict=True):
    for i in group:
      out[i] = value
  return out


def merged_map(attention, groups, weight):
  """One head's map between groups: rows averaged, columns summed."""
  rows = mean(groups, attention, weight)
  return np.stack([rows[:, g].sum(1) for g in groups], axis=1)
