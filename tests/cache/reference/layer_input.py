"""Slow NumPy versions of the methods: one example, one query, plain loops.

A reference is a function of a `LayerInput` (what a layer sees of an example)
to the outputs of its prompt `[N, H, D]` and of its steps `[steps, H, D]`.
Numbers of options are those of `cases.SMALL` and `cases.KEEP`, written out
again.
"""

import dataclasses
import math

import numpy as np

from tests.cache import cases
from tests.cache.cases import GROUPS, HEADS, STEPS, WIDTH

GROUP = HEADS // GROUPS
SCALE = WIDTH**-0.5


def rope(x, position):
  """Rotates `[..., D]` to one position."""
  half = x.shape[-1] // 2
  out = np.array(x, np.float64)
  for i in range(half):
    angle = position * 100.0 ** (-i / half)
    a, b = x[..., i], x[..., i + half]
    out[..., i] = a * math.cos(angle) - b * math.sin(angle)
    out[..., i + half] = a * math.sin(angle) + b * math.cos(angle)
  return out


def softmax(x):
  x = np.asarray(x, np.float64)
  e = np.exp(x - x.max())
  return e / e.sum()


@dataclasses.dataclass
class LayerInput:
  """One example at one layer.

  Attributes:
    layer: its number.
    n: length of the prompt; tokens n, n + 1, ... are generated.
    q, k, v: of all tokens, before rotation.
    x, token: inputs and ids of all tokens.
    params: what the layer has learned.
    shared: a dict that goes from layer to layer.
  """

  layer: int
  n: int
  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  x: np.ndarray
  token: np.ndarray
  params: dict
  shared: dict

  def __post_init__(self):
    total = range(self.n + STEPS)
    self.rq = np.stack([rope(self.q[i], i) for i in total])
    self.rk = np.stack([rope(self.k[i], i) for i in total])

  def weights(self, h, i, keys):
    """Softmax of query head h of token i over the keys numbered `keys`."""
    g = h // GROUP
    return softmax([SCALE * self.rq[i, h] @ self.rk[j, g] for j in keys])

  def head(self, h, i, keys):
    """Output of a query head over some keys."""
    w = self.weights(h, i, keys)
    return sum(w[m] * self.v[j, h // GROUP] for m, j in enumerate(keys))

  def out(self, i, keys_of_group):
    """Outputs of all heads of token i, keys given for each key head."""
    return np.stack(
      [self.head(h, i, keys_of_group[h // GROUP]) for h in range(HEADS)]
    )

  def dense(self, i):
    return self.out(i, [range(i + 1)] * GROUPS)

  def prompt(self):
    return np.stack([self.dense(i) for i in range(self.n)])


def layer_input(case, b: int, layer: int, shared: dict) -> LayerInput:
  """Example b of the shared text."""
  text, n = cases.TEXT, cases.LENGTHS[b]
  whole = cases.layers()[layer]
  cut = lambda x: x[: n + STEPS].astype(np.float64)
  return LayerInput(
    layer, n, *(cut(x[layer, b]) for x in (text.q, text.k, text.v, text.x)),
    text.token[b], case.params(whole), shared,
  )  # fmt: skip


def kept_then_all(s: LayerInput, kept):
  """Decodes over what is kept of the prompt and over all generated tokens."""
  outs = []
  for i in range(s.n, s.n + STEPS):
    outs.append(s.out(i, [[*keys, *range(s.n, i + 1)] for keys in kept]))
  return np.stack(outs)


def masked_prompt(s, sees):
  """Prompt where token i sees key j if `sees(i, j)`, for all heads."""
  outs = []
  for i in range(s.n):
    outs.append(s.out(i, [[j for j in range(i + 1) if sees(i, j)]] * GROUPS))
  return np.stack(outs)


def best(score, count, protected=()):
  """Indices of the largest scores, the protected ones among them, sorted."""
  score = np.asarray(score, np.float64).copy()
  score[list(protected)] = np.inf
  return sorted(np.argsort(-score, kind="stable")[:count].tolist())


def half(n):
  return max(int(n * 0.5), 1)
