"""Methods that search with queries that they make up of a chunk's."""

import math

import numpy as np

from tests.cache.reference.layer_input import best, half, softmax
from tests.cache.reference.retrieval import infllm


def actqkv(s, block=4, densities=(1.0, 3.0), least=1):
  """The second layer is three times as dense as the first, when decoding."""
  past = {"mean": None, "variance": None, "windows": 0}
  s.shared.setdefault("densities", []).append([])

  def usual(flat):
    size, n = len(flat), past["windows"]
    mean, variance = flat.mean(axis=0), flat.var(axis=0)
    if n == 0:
      total, weight = variance, 1 - 1 / size
      past["mean"] = mean
    else:
      total = past["variance"] * (n - 1 / size) + variance
      total = total + (mean - past["mean"]) ** 2 / (1 + 1 / n)
      weight = n + 1 - 1 / size
      past["mean"] = (past["mean"] * n + mean) / (n + 1)
    past["variance"] = total / weight if weight > 0 else 0 * total
    past["windows"] = n + 1

  def count_of(decoding, blocks):
    given = densities if decoding else (1.0, 1.0)
    mean = half(s.n) // block
    left = 2 * mean
    for layer in range(s.layer + 1):
      own = round(left * given[layer] / sum(given[layer:]))
      own = max(min(own, min(blocks, 2 * mean)), min(blocks, least))
      left -= own
    return own

  def search(turned, reps, decoding):
    flat = turned.reshape(len(turned), -1)
    usual(flat)
    if not reps:
      return []
    scale = past["variance"] + past["variance"].mean() / 100
    off = [np.mean((row - past["mean"]) ** 2 / scale) for row in flat]
    probe = sum(w * row for w, row in zip(off / np.sum(off), flat, strict=True))
    cosines = []
    for rep in reps:
      key = np.concatenate(rep)
      norms = np.linalg.norm(probe) * np.linalg.norm(key)
      cosines.append(probe @ key / norms)
    if len(reps) > 1:
      p = softmax(cosines)
      entropy = -sum(p * np.log(p)) / math.log(len(reps))
      s.shared["densities"][-1].append(entropy)
    return best(cosines, count_of(decoding, len(reps)))

  return infllm(s, block=block, search=search)
