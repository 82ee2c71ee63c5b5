"""Slow NumPy forms of the pruning rules, written from cards and official code.

Token 0 is the class token; indices that come out are those of the patches,
counted from 0. Nothing here imports tokjax.
"""

import math

import numpy as np


def by_score(score, indices=None):
  """Indices in descending score; of equals the lower index first."""
  indices = range(len(score)) if indices is None else indices
  return sorted(indices, key=lambda j: (-score[j], j))


def class_score(attention):
  """Mean over heads of the class token's row, patches only."""
  heads = attention.shape[0]
  return [
    sum(attention[h, 0, j] for h in range(heads)) / heads
    for j in range(1, attention.shape[-1])
  ]


def topk(attention, keep):
  return by_score(class_score(attention))[:keep]


def evit(x, attention, keep):
  """Patches after one stage: keep - 1 tokens and the fused one."""
  score = class_score(attention)
  order = by_score(score)
  top, rest = order[: keep - 1], order[keep - 1 :]
  fused = sum(score[j] * x[1 + j] for j in rest)
  return np.stack([x[1 + j] for j in top] + [fused])


def significance(attention, values):
  """Class attention summed over heads times the length of the value."""
  heads, tokens, _ = values.shape
  score = [
    sum(attention[h, 0, j] for h in range(heads))
    * math.sqrt(sum((values[h, j] ** 2).sum() for h in range(heads)))
    for j in range(1, tokens)
  ]
  return np.array(score) / sum(score)


def ats(score, points, rule):
  """Patches that are sampled, in ascending score."""
  n = len(score)
  ascending = sorted(range(n), key=lambda j: (score[j], j))
  if rule == "paper":
    tokens = list(range(n))
    cdf = np.cumsum(score)
    targets = [(2 * i - 1) / (2 * points) for i in range(1, points + 1)]
  else:
    tokens = ascending
    cdf = np.cumsum([score[j] for j in ascending])
    cdf = (cdf - cdf.min()) / (cdf.max() - cdf.min())
    first = min(c for c in cdf if c > 0)
    step = (1 - first) / (points - 1)
    targets = [first + i * step for i in range(points)]
  picked = set()
  for target in targets:
    gaps = [abs(target - c) for c in cdf]
    picked.add(tokens[gaps.index(min(gaps))])
  return [j for j in ascending if j in picked]


def vote(attention, start, iterations):
  """Every token passes its importance on to those it attends to."""
  n = len(start)
  s = np.array(start) / sum(start)
  for _ in range(iterations):
    s = np.array(
      [sum(s[i] * attention[i, j] for i in range(n)) for j in range(n)]
    )
  return s


def importance(attention, iterations, variance):
  """Root mean square over the heads that pass the variance filter."""
  n = attention.shape[-1]
  start = [math.sqrt(n)] + [1.0] * (n - 1)
  heads = [vote(a, start, iterations) for a in attention]
  spread = [np.var(s / s.mean()) for s in heads]
  passed = [
    s
    for s, v in zip(heads, spread, strict=True)
    if variance[0] <= v <= variance[1]
  ]
  passed = passed or heads
  return np.sqrt(sum(s**2 for s in passed) / len(passed))


def _among(attention, tokens):
  """Attention among some tokens only, rows normalised again."""
  part = attention[:, tokens][:, :, tokens]
  return part / part.sum(-1, keepdims=True)


def zero_tprune(attention, keys, keep, similar, variance, iterations):
  """Patches that stay after one pruning layer, in ascending index."""
  n = attention.shape[-1] - 1
  score = importance(attention, 1, variance)[1:]
  order = by_score(score)
  half = (n + 1) // 2
  target, source = order[:half], order[half:]
  key = keys.mean(0)[1:]
  key = key / np.linalg.norm(key, axis=-1, keepdims=True)
  best = {j: max(float(key[j] @ key[i]) for i in target) for j in source}
  gone = set(by_score(best, sorted(source))[: int(similar * (n - keep))])
  left = [j for j in range(n) if j not in gone]
  among = _among(attention, [0] + [1 + j for j in left])
  score = importance(among, iterations, variance)[1:]
  return sorted(left[i] for i in by_score(score)[:keep])


def tome_removals(r, slope, depth):
  """ToMe's (r, inflection): how many tokens each block removes."""
  first = int(r * (1 - slope))
  last = 2 * r - first
  return [int(first + (last - first) / (depth - 1) * i) for i in range(depth)]
