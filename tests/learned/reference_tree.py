"""Tree Cross Attention by recursion over one query, from the official code.

BorealisAI/tree-cross-attention:models/memory_modules.py (3c4a9c0).
"""

import math

import numpy as np


def norm(p, x):
  mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def attention(p, query, x):
  """One query `[d]` and the rows that it sees: output, weights `[h, n]`."""
  q, k, v = (
    np.einsum("...d,dhe->...he", y, p[name]["kernel"])
    for name, y in (("query", query), ("key", x), ("value", x))
  )
  weight = softmax(np.einsum("he,nhe->hn", q, k) / math.sqrt(q.shape[-1]))
  out = np.einsum("hn,nhe->he", weight, v)
  return np.einsum("he,hed->d", out, p["out"]["kernel"]) + p["out"][
    "bias"
  ], weight


def mlp(p, x):
  x = norm(p["norm"], x)
  up, gate = np.split(x @ p["fc1"]["kernel"] + p["fc1"]["bias"], 2)
  gelu = 0.5 * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
  return x + (up * gelu) @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def node(p, children):
  """The vector of a node; `children` are the real ones."""
  if not len(children):
    return np.zeros(p["norm"]["scale"].shape)
  made = []
  for child in children:
    normed = norm(p["norm"], child)
    made.append(
      mlp(p["mlp"], normed + attention(p["attention"], normed, children)[0])
    )
  return np.mean(made, axis=0)


def read(p, query, tokens, branch, strict=False):
  """Output, full output, log-probability, entropy and read rows of one query.

  Every node is made anew by recursion; a group of leaves that the tree has but
  the tokens do not reach is empty.
  """
  n = len(tokens)
  levels = 0
  while branch ** (levels + 1) <= n - 1:
    levels += 1
  each = math.ceil(n / branch**levels)

  def leaves(level, number):
    """Real tokens below a node."""
    wide = each * branch ** (levels - level)
    return tokens[number * wide : (number + 1) * wide]

  def vector(level, number):
    if level == levels:
      return node(p["node"], leaves(level, number))
    below = [number * branch + i for i in range(branch)]
    there = [vector(level + 1, i) for i in below if len(leaves(level + 1, i))]
    return node(p["node"], np.array(there))

  normed = norm(p["norm"], query)
  at, rows, log_prob, entropy = 0, [], 0.0, []
  for level in range(1, levels + 1):
    numbers = [at * branch + i for i in range(branch)]
    real = [i for i in numbers if len(leaves(level, i))]
    made = {i: vector(level, i) for i in numbers}
    weight = attention(
      p["attention"], normed, np.array([made[i] for i in real])
    )[1]
    share = weight.mean(axis=0)
    best = int(np.argmax(share))
    log_prob += np.log(share[best])
    entropy.append(-(weight * np.log(weight)).sum(axis=-1).mean())
    at = real[best]
    rows += [made[i] for i in numbers if i != at and (not strict or i in real)]
  rows += list(leaves(levels, at))

  def attended(x):
    y = normed + attention(p["attention"], normed, np.array(x))[0]
    return mlp(p["mlp"], y + query)

  entropy = np.mean(entropy) if entropy else 0.0
  return attended(rows), attended(tokens), log_prob, entropy, len(rows), at
