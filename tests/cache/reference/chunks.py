"""Attention to chunks of varying length, and to means of groups."""

import numpy as np

from tests.cache.cases import DEPTH, GROUPS, HEADS, STEPS
from tests.cache.reference.layer_input import (
  GROUP,
  SCALE,
  half,
  kept_then_all,
  masked_prompt,
  softmax,
)


def boundary_logit(made, k, i, n, w):
  """Of the gap behind token i: attention over 2 w keys, halves compared."""
  channels = k.shape[1]
  rows = [k[j] if 0 <= j < n else np.zeros(channels)
          for j in range(i - w + 1, i + w + 1)]  # fmt: skip
  x = np.stack(rows)
  dense = lambda name, x: x @ made[name] + made[f"{name}_bias"]
  q, key, v = (dense(name, x) for name in ("query", "key", "value"))
  y = np.zeros_like(x)
  size = channels // 4
  for h in range(4):
    part = slice(h * size, (h + 1) * size)
    for a in range(2 * w):
      p = softmax(key[:, part] @ q[a, part] / np.sqrt(size))
      y[a, part] = p @ v[:, part]
  y = dense("out", y)
  y = np.stack([(row - row.mean()) / np.sqrt(row.var() + 1e-5) for row in y])
  y = y * made["norm"] + made["norm_bias"]
  left, right = y[:w].mean(axis=0), y[w:].mean(axis=0)
  cosine = left @ right / (np.linalg.norm(left) * np.linalg.norm(right))
  features = [left, right, np.abs(left - right), left * right, [cosine]]
  hidden = np.maximum(dense("hidden", np.concatenate(features)), 0)
  return dense("last", hidden)[0]


def dhsa(s, block=4, first=2, near=3, exact=3):
  w, apart, most, least = 4, 2, 1, -0.2
  made = {k: np.asarray(x, np.float64) for k, x in s.params["attend"].items()}
  n = s.n
  k = s.rk[:n].reshape(n, -1)
  score = {i: boundary_logit(made, k, i, n, w) for i in range(w - 1, n - w)}
  selected = [n - exact]
  for i in sorted(score, key=lambda i: -score[i]):
    if len(selected) >= most * (n // block):
      break
    if score[i] > least and i <= n - exact:
      if all(abs(i - j) > apart for j in selected):
        selected.append(i)
  cuts = [0, *sorted(i + 1 for i in selected), n]
  mean_q, mean_k = s.rq[:n].mean(axis=1), s.rk[:n].mean(axis=1)
  represented = np.zeros((n, mean_k.shape[1]))
  for a, b in zip(cuts, cuts[1:], strict=False):
    represented[a:b] = mean_k[a:b].mean(axis=0) * np.sqrt(b - a)
  outs = []
  for i in range(n):
    if i >= n - exact:
      outs.append(s.dense(i))
      continue
    start = i // block * block
    queries = mean_q[start : min(start + block, n - exact)]
    query = queries.mean(axis=0) * np.sqrt(len(queries))
    end = min(start + block, n)
    value = represented[:end] @ query
    value[max(end - near, 0) :] = np.inf
    count = min(max(half(n), first + near), n)
    kept = sorted(np.argsort(-value, kind="stable")[:count].tolist())
    kept = [*range(min(first, end)), *kept[first:]]
    seen = [j for j in kept if j <= i]
    outs.append(s.out(i, [seen] * GROUPS))
  assert len(outs[0]) == HEADS
  return np.stack(outs), kept_then_all(s, [range(n)] * GROUPS)


def cca(s, group=4):
  """Cores of the groups that lie before the window, then the tokens."""
  local = half(s.n)

  def row(i, h):
    g = h // GROUP
    early = max((i + 1 - local) // group, 0)
    keys, values = [], []
    for m in range(early):
      members = range(m * group, (m + 1) * group)
      weight = s.weights(h, members[-1], members)
      keys.append(
        sum(w * s.rk[j, g] for w, j in zip(weight, members, strict=True))
      )
      values.append(
        sum(w * s.v[j, g] for w, j in zip(weight, members, strict=True))
      )
    for j in range(early * group, i + 1):
      keys.append(s.rk[j, g])
      values.append(s.v[j, g])
    return softmax(SCALE * np.array(keys) @ s.rq[i, h]) @ np.array(values)

  outs = [
    np.stack([row(i, h) for h in range(HEADS)]) for i in range(s.n + STEPS)
  ]
  return np.stack(outs[: s.n]), np.stack(outs[s.n :])


def sentinel_tokens(s, tokens=(3, 7)):
  """A sentinel goes back to the one before it, others to the beginning."""

  def sees(i, j):
    if s.token[i] not in tokens:
      return True
    return not any(s.token[m] in tokens for m in range(j, i))

  return masked_prompt(s, sees), kept_then_all(s, [range(s.n)] * GROUPS)


def spt(s, part=4):
  """The half of the keys whose nearest codewords agree most, for each head."""
  words = np.asarray(s.params["attend"]["words"], np.float64)

  def code(x):
    parts = x.reshape(-1, part)
    return [
      min(range(len(w)), key=lambda i, w=w, x=x: np.abs(x - w[i]).sum())
      for w, x in zip(words, parts, strict=True)
    ]

  def head(i, h):
    mine = code(s.rq[i, h])
    agree = [
      sum(a == b for a, b in zip(mine, code(s.rk[j, h // GROUP]), strict=True))
      for j in range(i + 1)
    ]
    kept = sorted(range(i + 1), key=lambda j: (-agree[j], j))[: half(s.n)]
    x = [SCALE * s.rq[i, h] @ s.rk[j, h // GROUP] for j in kept]
    return softmax(np.clip(x, -10, 10)) @ s.v[kept, h // GROUP]

  outs = [np.stack([head(i, h) for h in range(HEADS)]) for i in range(s.n)]
  return np.stack(outs), kept_then_all(s, [range(s.n)] * GROUPS)


def lemo(s, block=4):
  """Half of the tokens, in the blocks that two networks expect most of."""
  n, steps = s.n, kept_then_all(s, [range(s.n)] * GROUPS)
  if s.layer == DEPTH - 1:
    return s.prompt(), steps
  made = {k: np.asarray(x, np.float64) for k, x in s.params["attend"].items()}
  relu = lambda x: np.maximum(x, 0)

  def side(name, m, h):
    size = s.x.shape[1] // HEADS
    x = np.zeros((block, size))
    for i in range(m * block, min((m + 1) * block, n)):
      x[i - m * block] = s.x[i, h * size : (h + 1) * size]
    y = relu(relu(x.reshape(-1) @ made[name + "1"]) @ made[name + "2"])
    return y @ made[name + "3"]

  blocks = -(-n // block)
  score = np.zeros(blocks)
  for h in range(HEADS):
    for m in range(blocks):
      score[m] += sum(side("q", i, h) for i in range(blocks)) @ side("k", m, h)
  kept = np.argsort(-score, kind="stable")[: max(half(n) // block, 1)]
  members = [j for j in range(n) if j // block in kept]
  outs = np.zeros((n, HEADS, s.v.shape[-1]))
  for i in members:
    outs[i] = s.out(i, [[j for j in members if j <= i]] * GROUPS)
  return outs, steps
