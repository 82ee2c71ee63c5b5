"""Slow, independent versions of rules that act before the language model.

Written from the official code, in numpy, for one image. `Seen` holds what they
look at; each returns the visual tokens that the projector is given.
"""

import math
from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
  """One image in an encoder.

  Attributes:
    hidden: features, the class token first, `[n + 1, d]`.
    attention: maps of every block, `[h, n + 1, n + 1]` each.
    keys: of every block, `[h, n + 1, k]` each.
    ahead: (queries, keys) of the block behind the features, `[n + 1, d]`.
    columns: of the grid.
  """

  hidden: np.ndarray
  attention: list[np.ndarray]
  keys: list[np.ndarray]
  ahead: tuple[np.ndarray, np.ndarray]
  columns: int


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def descending(score):
  return sorted(range(len(score)), key=lambda i: (-score[i], i))


def visionzip(seen, dominant, contextual):
  """`dominant` counts the class token."""
  row = seen.attention[-1][:, 0, 1:].sum(axis=0)
  best = sorted(1 + i for i in descending(row)[: dominant - 1])
  rest = [i for i in range(1, len(seen.hidden)) if i not in best]
  metric = unit(seen.keys[-1].mean(axis=0))
  step = max(1, len(rest) // max(contextual, 1))
  targets = rest[::step][:contextual]
  members = {t: [] for t in targets}
  for i in rest:
    if i not in targets and targets:
      members[max(targets, key=lambda t: metric[i] @ metric[t])].append(i)
  merged = [
    seen.hidden[t] + (seen.hidden[own].mean(axis=0) if own else 0)
    for t, own in members.items()
  ]
  return np.stack([seen.hidden[0], *seen.hidden[best], *merged])


def by_class(seen, keep, blocks=1):
  """FasterVLM; VTC-CLS sums several blocks."""
  row = sum(a[:, 0, 1:].mean(axis=0) for a in seen.attention[-blocks:])
  return seen.hidden[1:][sorted(descending(row)[:keep])]


def vispruner(seen, keep, share, step=8):
  row = seen.attention[-1][:, 0, 1:].mean(axis=0)
  ranked, x = descending(row), unit(seen.hidden[1:])
  important = ranked[: int(keep * share)]
  residual = ranked[int(keep * share) :]
  while len(residual) > keep - len(important):
    gone = min(step, len(residual) - keep + len(important))
    a, b = residual[::2], residual[1::2]
    nearest = [max(x[i] @ x[j] for j in b) for i in a]
    residual = [a[i] for i in descending(nearest)[gone:]] + b
  return seen.hidden[1:][sorted([*important, *residual])]


def todre(seen, keep, heads, join):
  """`join` makes one number of the distances to all picked ones."""
  q, k = (x.reshape(len(x), heads, -1) for x in seen.ahead)
  logits = np.einsum("hd,nhd->hn", q[0], k) / math.sqrt(q.shape[-1])
  row = np.exp(logits - logits.max(axis=1, keepdims=True))
  row = (row / row.sum(axis=1, keepdims=True)).mean(axis=0)[1:]
  x = unit(seen.hidden[1:])
  picked = [int(np.argmax(row))]
  while len(picked) < keep:
    apart = join(1 - x @ x[picked].T, axis=1)
    apart[picked] = -np.inf
    picked.append(int(np.argmax(apart)))
  return seen.hidden[1:][sorted(picked)]


def holov(seen, keep, chunks, weight):
  x, row = seen.hidden[1:], seen.attention[-1][:, 0, 1:].mean(axis=0)
  parts, start = [], 0
  for p in range(chunks):
    stop = start + len(x) // chunks + (p < len(x) % chunks)
    if stop > start:
      parts.append(list(range(start, stop)))
    start = stop
  value = []
  for part in parts:
    n = len(part)
    if n == 1:
      value.append(row[part].mean())
      continue
    cosine = unit(x[part]) @ unit(x[part]).T
    np.fill_diagonal(cosine, 0)
    mean = cosine.sum(axis=1) / (n - 1)
    spread = ((cosine - mean[:, None]) ** 2).sum(axis=1) / (n - 1)
    scaled = row[part] * 1000
    scale = np.abs(scaled).mean() / (np.abs(spread).mean() + 1e-6)
    value.append((scaled + weight * scale * spread).mean())
  share = np.array(value) / (sum(value) + 1e-6)
  quota = np.floor(share * keep).astype(int)
  for p in descending(share)[: keep - quota.sum()]:
    quota[p] += 1
  out = []
  for part, q in zip(parts, quota, strict=True):
    ranked = [part[i] for i in descending(row[part])]
    out += part if q >= len(part) else ranked[:q]
  return x[out]


def scope(seen, keep, power):
  weight = seen.attention[-1][:, 0, 1:].sum(axis=0) ** power
  x = unit(seen.hidden[1:])
  cosine, picked = x @ x.T, []
  covered = np.zeros(len(x))
  for _ in range(keep):
    gain = np.maximum(cosine - covered[:, None], 0).sum(axis=0) * weight
    gain[picked] = -np.inf
    picked.append(int(np.argmax(gain)))
    covered = np.maximum(covered, cosine[picked[-1]])
  return seen.hidden[1:][sorted(picked)]


def gprune(x, keep, similarity, temperature, iterations):
  """Of projected tokens: which are kept."""
  cosine = unit(x) @ unit(x).T
  cosine[cosine < similarity] = 0
  logits = cosine / temperature
  logits[np.abs(logits) < 1e-6] = -5000
  chance = np.exp(logits - logits.max(axis=1, keepdims=True))
  chance /= chance.sum(axis=1, keepdims=True)
  flow = np.linalg.matrix_power(chance, iterations)
  score = np.linalg.norm(x, axis=1) @ flow / (chance > 0).sum(axis=1)
  return sorted(descending(score)[:keep])


def received(attention):
  return attention.mean(axis=0).mean(axis=0)[1:]


def hiprune(seen, keep, share, middle):
  n = len(seen.hidden) - 1
  anchors = descending(received(seen.attention[middle]))
  chosen = set()
  for i in anchors[: round(keep * share / 5)]:
    for step in (0, -1, 1, -seen.columns, seen.columns):
      chosen.add(min(max(i + step, 0), n - 1))
  late = descending(received(seen.attention[-1]))
  late = [i for i in late if i not in chosen][: keep - len(chosen)]
  return seen.hidden[1:][sorted([*chosen, *late])]


def fopru(seen, keep, rows):
  score = received(seen.attention[-1])
  if rows:
    score = score.reshape(-1, seen.columns).sum(axis=1).repeat(seen.columns)
  return seen.hidden[1:][sorted(descending(score)[:keep])]


def divprune(x, keep):
  """Of projected tokens: which are picked."""
  distance = 1 - unit(x) @ unit(x).T
  picked = [int(np.argmax(np.sort(distance, axis=0)[1]))]
  while len(picked) < keep:
    near = distance[picked].min(axis=0)
    near[picked] = -np.inf
    picked.append(int(np.argmax(near)))
  return sorted(picked)


def prumerge(seen, spaced, neighbours=32):
  q, k = seen.ahead
  n, width = len(q) - 1, q.shape[1]
  logits = k @ q[0] * width**-0.5
  score = np.exp(logits - logits.max())
  score = (score / score.sum())[1:]
  low, high = np.quantile(score, [0.25, 0.75])
  many = int((score > high + 1.5 * (high - low)).sum())
  kept = descending(score)[:many]
  if spaced:
    step = int(int(n / many) / 3)
    kept += [i for i in range(0, n - 1, step) if i not in kept]
  metric, x = unit(k[1:]), seen.hidden[1:]
  out = []
  for i in kept:
    others = [j for j in range(n) if j != i]
    near = sorted(others, key=lambda j: -(metric[i] @ metric[j]))[:neighbours]
    out.append(x[i] + sum(score[j] * x[j] for j in near))
  left = [j for j in range(n) if j not in kept]
  return np.stack([*out, sum(score[j] * x[j] for j in left)])


def fold(x, keys, row, size, keep, weight):
  """FOLDER, of patches behind a class token: the merged `x`."""
  x, keys, row, size = map(np.array, (x, keys, row, size))
  while len(x) > keep:
    gone = min(len(x) // 2, len(x) - keep)
    targets, sources = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edge = {}
    for i in sources:
      near = [unit(keys[i]) @ unit(keys[j]) for j in targets]
      edge[i] = max(near) - 100 * weight * row[i], targets[np.argmax(near)]
    ranked = sorted(sources, key=lambda i: -edge[i][0])
    members = {i: [i] for i in [*sorted(ranked[gone:]), *targets]}
    for i in ranked[:gone]:
      members[edge[i][1]].append(i)
    mean = lambda v, own, w: (
      sum(v[i] * w[i] for i in own) / sum(w[i] for i in own)
    )
    own = list(members.values())
    x, keys = (
      np.stack([mean(v, o, size) for o in own]) for v in (x, keys)
    )
    row = np.array([row[o].mean() for o in own])
    size = np.array([size[o].sum() for o in own])
  return x


def token_corr(seen, room, similarity, others, share, local):
  """TokenCorrCompressor, from its card: distinct tokens, and a mean."""
  keys = unit(np.concatenate(list(seen.keys[-1]), axis=-1)[1:])
  n = len(keys)
  alike = [
    sum(keys[i] @ keys[j] >= similarity for j in range(n) if j != i)
    for i in range(n)
  ]
  count = min(sum(many < others for many in alike), room - 1)
  late, early = (
    seen.attention[i][:, 0, 1:].mean(axis=0) for i in (-1, local)
  )
  kept = descending(late)[: int(count * share)]
  kept += [i for i in descending(early) if i not in kept][: count - len(kept)]
  rest = [i for i in range(n) if i not in kept]
  x = seen.hidden[1:]
  return np.concatenate([x[sorted(kept)], x[rest].mean(axis=0)[None]])
