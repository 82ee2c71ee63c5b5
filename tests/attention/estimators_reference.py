"""Block estimators in float64 NumPy: loops over heads, queries and blocks."""

import numpy as np


def _softmax(logits):
  peak = logits.max()
  if np.isneginf(peak):
    return np.zeros(len(logits))
  weight = np.exp(logits - peak)
  return weight / weight.sum()


def _row(query, keys, bias, visible):
  """Attention of one query."""
  logits = keys @ query / np.sqrt(len(query)) + bias
  return _softmax(np.where(visible, logits, -np.inf))


def _members(n, block, real):
  """Real tokens of each block."""
  return [
    [i for i in range(start, min(start + block, n)) if real[i]]
    for start in range(0, n, block)
  ]


def reference(name, q, k, *, block_q, block_k, bias, q_mask, k_mask, sees, **o):
  """Estimated mass (not its logarithm), `[h, q blocks, k blocks]`.

  `sees(i, j)` says whether query i may see key j; masks and bias are arrays.
  """
  q, k = q.astype(np.float64), k.astype(np.float64)
  k = np.repeat(k, len(q) // len(k), axis=0)
  heads, m, _ = q.shape
  n = k.shape[1]
  queries, keys = _members(m, block_q, q_mask), _members(n, block_k, k_mask)
  out = np.zeros((heads, len(queries), len(keys)))
  visible = np.array([[sees(i, j) for j in range(n)] for i in range(m)])
  bias = np.where(k_mask, bias, -np.inf)
  if name == "antidiagonal":
    o |= {"block_q": block_q, "block_k": block_k}
  for h in range(heads):
    out[h] = _ONE[name](q[h], k[h], queries, keys, bias, visible, **o)
  return out


def _mean_pooled(q, k, queries, keys, bias, visible):
  out = np.zeros((len(queries), len(keys)))
  for i, rows in enumerate(queries):
    mean = q[rows].mean(0) if rows else np.zeros(q.shape[1])
    for j, columns in enumerate(keys):
      if columns:
        logit = mean @ k[columns].mean(0) / np.sqrt(q.shape[1])
        out[i, j] = np.exp(logit) * np.exp(bias[columns]).sum()
  return out


def _bound(q, k, queries, keys, bias, visible):
  out = np.zeros((len(queries), len(keys)))
  for i, rows in enumerate(queries):
    for j, columns in enumerate(keys):
      if not columns:
        continue
      low, high = k[columns].min(0), k[columns].max(0)
      limits = [np.maximum(q[r] * low, q[r] * high).sum() for r in rows]
      limit = max(limits, default=0) / np.sqrt(q.shape[1])
      out[i, j] = np.exp(limit + bias[columns].max())
  return out


def _landmark(q, k, queries, keys, bias, visible):
  out = np.zeros((len(queries), len(keys)))
  there = [j for j, columns in enumerate(keys) if columns]
  at = [keys[j][-1] for j in there]
  for i, rows in enumerate(queries):
    for r in rows:
      p = _row(q[r], k[at], bias[at], visible[r, at])
      out[i, there] += p / len(rows)
  return out


def _by_block(p, keys):
  return np.array([p[columns].sum() for columns in keys])


def _sampled(q, k, queries, keys, bias, visible, samples):
  out = np.zeros((len(queries), len(keys)))
  for i, rows in enumerate(queries):
    if not rows:
      out[i] = np.nan
    for s in range(samples if rows else 0):
      r = rows[s * len(rows) // samples]
      p = _row(q[r], k, bias, visible[r])
      out[i] += _by_block(p, keys) / samples
  return out


def _last_query(q, k, queries, keys, bias, visible, rows):
  real = [r for block in queries for r in block][-rows:]
  total = sum(_by_block(_row(q[r], k, bias, visible[r]), keys) for r in real)
  return np.broadcast_to(total / len(real), (len(queries), len(keys)))


def _lse_cached(q, k, queries, keys, bias, visible):
  out = np.zeros((len(queries), len(keys)))
  for i, rows in enumerate(queries):
    for r in rows:
      out[i] += _by_block(_row(q[r], k, bias, visible[r]), keys)
  return out


def _antidiagonal(q, k, queries, keys, bias, visible, stride, block_q, block_k):
  m, n, width = len(q), len(k), q.shape[1]
  asked = np.zeros(m, bool)
  asked[[r for rows in queries for r in rows]] = True
  there = np.isfinite(bias)
  tiles = -(-n // stride)
  out = np.zeros((len(queries), len(keys)))
  for a in range(-(-m // stride)):
    logits = np.full(tiles, -np.inf)
    for b in range(tiles):
      inside = range(b * stride, min((b + 1) * stride, n))
      own = [bias[j] for j in inside if there[j]]
      # Whether the last query may see the first key, hidden or not.
      shown = visible[min(a * stride + stride - 1, m - 1), b * stride]
      if not own or not shown:
        continue
      total = 0.0
      for s in range(stride):
        i, j = a * stride + stride - 1 - s, b * stride + s
        if i < m and j < n and asked[i] and there[j]:
          total += q[i] @ k[j]
      logits[b] = total / np.sqrt(width) / stride + np.log(np.exp(own).mean())
    if asked[a * stride : (a + 1) * stride].any():
      p = _softmax(logits)
      for b in range(tiles):
        out[a * stride // block_q, b * stride // block_k] += p[b]
  return out


_ONE = {
  "antidiagonal": _antidiagonal,
  "bound": _bound,
  "landmark": _landmark,
  "last_query": _last_query,
  "lse_cached": _lse_cached,
  "mean_pooled": _mean_pooled,
  "sampled": _sampled,
}
