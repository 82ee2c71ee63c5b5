"""Slow NumPy forms of the learned rules, from cards and official code.

Nothing here imports tokjax. Parameters are nested dicts as Flax has them.
"""

import math

import numpy as np

ERF = np.vectorize(math.erf)


def softmax(z, axis=-1):
  e = np.exp(z - z.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def gelu(x):
  return 0.5 * x * (1 + ERF(x / math.sqrt(2)))


def gelu_tanh(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def layer_norm(x, p, epsilon):
  mean = x.mean(axis=-1, keepdims=True)
  var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
  return (x - mean) / np.sqrt(var + epsilon) * p["scale"] + p["bias"]


def linear(x, p):
  return x @ p["kernel"] + p["bias"]


def policy_softmax(logits, policy, epsilon=1e-6):
  """Rows of `logits [n, n]`; a token always sees itself."""
  n = len(policy)
  out = np.zeros((n, n))
  for i in range(n):
    top = max(logits[i])
    e = [
      math.exp(logits[i, j] - top) * (1.0 if i == j else policy[j])
      for j in range(n)
    ]
    for j in range(n):
      out[i, j] = (e[j] + epsilon / n) / (sum(e) + epsilon)
  return out


def keep_predictor(p, x, present):
  """DynamicViT's log-probabilities `[f, 2]` of one example."""
  z = gelu(linear(layer_norm(x, p["norm"], 1e-5), p["embed"]))
  half = x.shape[-1] // 2
  mean = (z[:, half:] * present[:, None]).sum(axis=0) / present.sum()
  z = np.concatenate([z[:, :half], np.tile(mean, (len(x), 1))], axis=-1)
  for name in ("hidden_0", "hidden_1"):
    z = gelu(linear(z, p[name]))
  return np.log(softmax(linear(z, p["out"])))


def token_learner(p, x):
  """Version 1.1: `[m, d]` averages of `x [n, d]`."""
  y = layer_norm(x, p["norm"], 1e-6)
  logits = linear(gelu_tanh(linear(y, p["fc1"])), p["fc2"])
  return softmax(logits, axis=0).T @ x


def modulate(x_src, x_dst, s_src, s_dst, by_rank, by_channel, norm):
  """PYRA's sources after modulation, pairs in rank order."""
  pair = layer_norm(s_src[:, None] * x_src + s_dst[:, None] * x_dst, norm, 1e-5)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  out = x_src.copy()
  for i in range(len(x_src)):
    token = 2 * sigmoid(pair[i] @ by_channel) - 1
    for d in range(x_src.shape[1]):
      channel = 2 * sigmoid(
        sum(by_rank[j] * pair[j, d] for j in range(len(pair)))
      )
      out[i, d] += x_src[i, d] * channel * token
  return out


def best_pairs(metric, r, protected):
  """ToMe's r pairs (source, target) by similarity; class token first."""
  unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
  n = len(metric)
  edges = []
  for a in range(0, n, 2):
    if a < protected:
      continue
    scores = [
      (unit[a] @ unit[b] if b >= protected else -np.inf, -b)
      for b in range(1, n, 2)
    ]
    value, b = max(scores)
    edges.append((-value, a, -b))
  return [(a, b) for _, a, b in sorted(edges)[:r]]


def connectivity(mixture, basis, keep, terms=8, floor=0.02):
  """Sparsifiner's mask of one head: `[n, n]` of 0 and 1."""
  n = len(basis)
  strong = np.where(np.abs(basis) > floor, np.abs(basis), 0)
  out = np.zeros((n, n))
  out[0] = 1
  for i, row in enumerate(mixture):
    few = np.zeros_like(row)
    for j in np.argsort(-row, kind="stable")[:terms]:
      few[j] = row[j]
    score = strong @ few
    for j in np.argsort(-score, kind="stable")[: math.ceil(keep * n)]:
      out[i + 1, j] = 1
  return out


def window_mean(x, dilation):
  """Mean of nine places of `x [h, w, d]`, zeros outside."""
  h, w, _ = x.shape
  out = np.zeros_like(x)
  for i in range(h):
    for j in range(w):
      for di in (-dilation, 0, dilation):
        for dj in (-dilation, 0, dilation):
          if 0 <= i + di < h and 0 <= j + dj < w:
            out[i, j] += x[i + di, j + dj] / 9
  return out


def diversity(attention, factor):
  """ADL of one layer `[h, n, n]`."""
  rows = attention.mean(axis=0)
  n = len(rows)
  centre = rows.mean(axis=0)
  centre = np.where(centre > factor / n, centre, 0)
  total = 0.0
  for row in rows:
    row = np.where(row > factor / n, row, 0)
    length = np.linalg.norm(row) * np.linalg.norm(centre)
    total += row @ centre / length if length > 0 else 0.0
  return total / n
