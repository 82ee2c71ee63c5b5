"""Methods that look at the attention of the prompt."""

import math

import numpy as np

from tests.cache.cases import DEPTH, GROUPS, HEADS, STEPS, WIDTH
from tests.cache.reference.layer_input import (
  GROUP,
  SCALE,
  best,
  half,
  kept_then_all,
  rope,
  softmax,
)


def window_scores(s, heads_first=False, pooling="avg", reduce=np.mean):
  """SnapKV's scores with window 4 and kernel 3, `[G, n]`."""
  w = min(4, s.n)
  scores = []
  for g in range(GROUPS):
    rows = []
    for h in range(g * GROUP, (g + 1) * GROUP):
      mass = np.zeros(s.n)
      for i in range(s.n - w, s.n):
        mass[: i + 1] += s.weights(h, i, range(i + 1)) / w
      mass[s.n - w :] = 0
      rows.append(mass)
    if heads_first:
      rows = [reduce(rows, axis=0)]
    pooled = []
    for mass in rows:
      pad = np.concatenate([[0], mass, [0]])
      parts = [pad[j : j + 3] for j in range(s.n)]
      pooled.append([p.mean() if pooling == "avg" else p.max() for p in parts])
    scores.append(reduce(pooled, axis=0))
  return np.stack(scores)


def snapkv(s):
  scores = window_scores(s)
  count = max(half(s.n), min(4, s.n))
  kept = [best(x, count, range(s.n - min(4, s.n), s.n)) for x in scores]
  return s.prompt(), kept_then_all(s, kept)


def pyramid_count(n, layer, c, w=4, beta=20, depth=DEPTH):
  """Budget of a layer, window included."""
  b = c - w
  if n <= c or b <= 0 or n < 2 * b:
    return c
  low = b // beta
  high = 2 * b - low
  if high >= n - w:
    high = n - w
    low = 2 * b - high
  return high - layer * ((high - low) // (depth - 1)) + w


def pyramidkv(s, pooling="avg"):
  """The path for grouped heads: their mean is pooled."""
  count = max(pyramid_count(s.n, s.layer, half(s.n)), 4)
  scores = window_scores(s, heads_first=True, pooling=pooling)
  kept = [best(x, count, range(s.n - 4, s.n)) for x in scores]
  return s.prompt(), kept_then_all(s, kept)


def adakv(s, w=4, alpha=0.2, normalise=False):
  """Heads' scores are sorted, weighed by head, and cut together."""
  scores = window_scores(s, heads_first=True, pooling="max")
  b = half(s.n) - w
  rivals = []
  for g in range(GROUPS):
    row = sorted(scores[g, : s.n - w], reverse=True)
    weight = sum(row[:b]) / sum(row) if normalise else 1.0
    rivals += [(x * weight, g) for x in row]
  rivals.sort(key=lambda pair: -pair[0])
  taken = [g for _, g in rivals[: GROUPS * b]]
  kept = []
  for g in range(GROUPS):
    own = round(taken.count(g) * (1 - alpha) + math.floor(b * alpha))
    free = best(scores[g, : s.n - w], own)
    kept.append([*free, *range(s.n - w, s.n)])
  return s.prompt(), kept_then_all(s, kept)


def h2o(s):
  heavy = recent = int(s.n * 0.25)
  mass = np.zeros((GROUPS, s.n + STEPS))

  def add(i, keys):
    for h in range(HEADS):
      for w, j in zip(
        s.weights(h, i, keys[h // GROUP]), keys[h // GROUP], strict=True
      ):
        mass[h // GROUP, j] += w

  for i in range(s.n):
    add(i, [range(i + 1)] * GROUPS)

  def evict(cache, g):
    if len(cache) <= heavy + recent:
      return cache
    old = cache[: len(cache) - recent]
    keep = best([mass[g, j] for j in old], heavy)
    return [old[j] for j in keep] + cache[len(cache) - recent :]

  caches = [evict(list(range(s.n)), g) for g in range(GROUPS)]
  outs = []
  for t in range(STEPS):
    i = s.n + t
    caches = [[*c, i] for c in caches]
    outs.append(s.out(i, caches))
    add(i, caches)
    caches = [evict(c, g) for g, c in enumerate(caches)]
  return s.prompt(), np.stack(outs)


def expected_attention(s, sinks=2, future=5):
  late = range(min(sinks, s.n), s.n)
  rotation = np.mean(
    [
      np.stack([rope(e, s.n + t) for e in np.eye(WIDTH)], axis=1)
      for t in range(future)
    ],
    axis=0,
  )
  kept = []
  for g in range(GROUPS):
    scores = np.zeros(s.n)
    for h in range(g * GROUP, (g + 1) * GROUP):
      q = s.q[list(late), h]
      mean = q.mean(axis=0)
      cov = (q - mean).T @ (q - mean) / len(q)
      mean, cov = rotation @ mean, rotation @ cov @ rotation.T
      z = [
        SCALE * mean @ s.rk[j, g] + SCALE**2 / 2 * s.rk[j, g] @ cov @ s.rk[j, g]
        for j in late
      ]
      scores[list(late)] += softmax(z) / GROUP
    scores *= [np.linalg.norm(s.v[j, g]) for j in range(s.n)]
    kept.append(best(scores, max(half(s.n), sinks), range(sinks)))
  return s.prompt(), kept_then_all(s, kept)


def razor_attention(s, first=2):
  """No head is a retrieval head."""
  window = half(s.n)
  outs = []
  for t in range(STEPS):
    i = s.n + t
    out = []
    for h in range(HEADS):
      g = h // GROUP
      # The window is cut at the prompt's end, then when one entry too many
      # is there: as many tokens as fit stay exact until then.
      gone = razor_gone(s.n, t, first, window)
      keep = [j for j in range(i + 1) if j not in gone]
      logits = [SCALE * s.rq[i, h] @ s.rk[j, g] for j in keep]
      values = [s.v[j, g] for j in keep]
      if gone:
        k = np.mean([s.rk[j, g] for j in gone], axis=0)
        v = np.mean([s.v[j, g] for j in gone], axis=0)
        logits.append(SCALE * s.rq[i, h] @ k + math.log(len(gone)))
        values.append(v)
      out.append(softmax(logits) @ np.stack(values))
    outs.append(np.stack(out))
  return s.prompt(), np.stack(outs)


def razor_gone(n, t, first, window):
  """Tokens merged before step t's attention."""
  gone = set(range(first, n - window))
  for u in range(t + 1):
    there = n + u + 1 - len(gone) + bool(gone)
    if there > first + window + 1:
      gone |= set(range(first, n + u + 1 - window))
  return sorted(gone)
