"""Methods that read some of a cache that keeps everything."""

import numpy as np

from tests.cache.cases import GROUPS, HEADS, STEPS
from tests.cache.reference.layer_input import GROUP, best, half


def quest(s, page=4, least=1):
  outs = []
  for t in range(STEPS):
    i = s.n + t
    out = []
    for h in range(HEADS):
      g = h // GROUP
      pages = [
        [j for j in range(p, p + page) if j <= i] for p in range(0, i + 1, page)
      ]
      bound = []
      for members in pages:
        keys = s.rk[members, g]
        low, high = keys.min(axis=0), keys.max(axis=0)
        q = s.rq[i, h]
        bound.append(np.maximum(q * low, q * high).sum())
      count = max(half(s.n) // page, least)
      chosen = best(bound, count) if s.layer >= 1 else range(len(pages))
      out.append(s.head(h, i, [j for p in chosen for j in pages[p]]))
    outs.append(np.stack(out))
  return s.prompt(), np.stack(outs)


def tidaldecode(s):
  if s.layer == 0:
    s.shared["kept"] = {}
  outs = []
  for t in range(STEPS):
    i = s.n + t
    out = []
    for h in range(HEADS):
      if s.layer == 0:
        logits = [s.rq[i, h] @ s.rk[j, h // GROUP] for j in range(i + 1)]
        s.shared["kept"][t, h] = best(logits, half(s.n))
        out.append(s.head(h, i, range(i + 1)))
      else:
        out.append(s.head(h, i, s.shared["kept"][t, h]))
    outs.append(np.stack(out))
  return s.prompt(), np.stack(outs)


def delta(s, page=4, newest=1):
  """Layer 0 chooses pages for layer 1, all heads together."""
  if s.layer == 0:
    s.shared["pages"] = {}
  outs = []
  for t in range(STEPS):
    i = s.n + t
    pages = [
      [j for j in range(p, p + page) if j <= i] for p in range(0, i + 1, page)
    ]
    if s.layer == 0:
      attention = [s.weights(h, i, range(i + 1)) for h in range(HEADS)]
      largest = np.max(attention, axis=0)
      score = [sum(largest[j] for j in members) for members in pages]
      forced = range(len(pages) - newest, len(pages))
      chosen = best(score, max(half(s.n) // page, newest), forced)
      s.shared["pages"][t] = [j for p in chosen for j in pages[p]]
      outs.append(s.dense(i))
    else:
      outs.append(s.out(i, [s.shared["pages"][t]] * GROUPS))
  return s.prompt(), np.stack(outs)
