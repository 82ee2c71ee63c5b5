"""Methods that retrieve, chunk by chunk of queries."""

import numpy as np

from tests.cache.cases import GROUPS, HEADS, STEPS, WIDTH
from tests.cache.reference.layer_input import (
  GROUP,
  SCALE,
  best,
  half,
  rope,
  softmax,
)


def chunked(s, look, chunk=4):
  """`look(start, stop)` of prompt chunks, then of single tokens."""
  cuts = [(a, min(a + chunk, s.n)) for a in range(0, s.n, chunk)]
  cuts += [(i, i + 1) for i in range(s.n, s.n + STEPS)]
  outs = np.concatenate([look(*cut) for cut in cuts])
  return outs[: s.n], outs[s.n :]


def at_positions(s, h, i, keys, places, place):
  """Head h of token i at `place` over keys at `places`."""
  g = h // GROUP
  q = rope(s.q[i, h], place)
  w = softmax(
    [SCALE * q @ rope(s.k[j, g], p) for j, p in zip(keys, places, strict=True)]
  )
  return sum(w[m] * s.v[j, g] for m, j in enumerate(keys))


def tokenselect(s, first=2, local=6):
  count = half(s.n)

  def look(start, stop):
    keys = list(range(stop))
    if stop > first + local + count:
      middle = range(first, stop - local)
      votes = np.zeros(len(middle))
      for h in range(HEADS):
        q = s.q[start:stop, h].mean(axis=0)
        votes += softmax([q @ s.k[j, h // GROUP] for j in middle])
      pad = np.concatenate([[0], votes, [0]])
      votes = [pad[j : j + 3].max() for j in range(len(middle))]
      keys = [
        *range(first),
        *(middle[j] for j in best(votes, count)),
        *range(stop - local, stop),
      ]
    outs = []
    for i in range(start, stop):
      place = len(keys) - (stop - i)
      seen = keys[: place + 1]
      outs.append(
        np.stack(
          [
            at_positions(s, h, i, seen, range(len(seen)), place)
            for h in range(HEADS)
          ]
        )
      )
    return np.stack(outs)

  return chunked(s, look)


def longheads(s, w=4):
  count = max(half(s.n) // w, 3)
  chunk_keys = {}

  def chunk_key(c, h):
    if (c, h) not in chunk_keys:
      g, rows = h // GROUP, range(c * w, (c + 1) * w)
      k = np.stack([rope(s.k[j, g], j % w) for j in rows])
      out = [
        softmax(SCALE * k @ rope(s.q[i, h], i % w)) @ s.v[list(rows), g]
        for i in rows
      ]
      chunk_keys[c, h] = softmax(SCALE * k @ np.mean(out, axis=0)) @ k
    return chunk_keys[c, h]

  def look(start, stop):
    outs = []
    for i in range(start, stop):
      out = []
      for h in range(HEADS):
        own = i // w
        forced = {0, max(own - 1, 0), own}
        free = [c for c in range(own) if c not in forced]
        free.sort(key=lambda c, i=i, h=h: -(s.q[i, h] @ chunk_key(c, h)))
        chosen = sorted([*forced, *free[: count - len(forced)]])
        keys, places = [], []
        for slot, c in enumerate(chosen):
          for u in range(w):
            if c * w + u <= i:
              keys.append(c * w + u)
              places.append(slot * w + u)
        place = (len(chosen) - 1) * w + i % w
        out.append(at_positions(s, h, i, keys, places, place))
      outs.append(np.stack(out))
    return np.stack(outs)

  return chunked(s, look)


def infllm(s, most_first=2, local=6, block=4, speakers=2, search=None):
  """Far queries are turned to `local - 1`: the table's last entry is used.

  `search(turned queries of the chunk, keys of the blocks, whether it decodes)`
  gives the blocks.
  """
  count = half(s.n) // block
  mass = np.zeros((HEADS, s.n + STEPS))
  reps = []

  def layout(there):
    first = min(max(there - local, 0), most_first)
    return first, max((there - first - local) // block, 0)

  def look(start, stop):
    first, blocks = layout(start)
    assert blocks == len(reps)
    rest = first + blocks * block
    turned = np.stack([rope(s.q[i], local - 1) for i in range(start, stop)])
    if search is not None:
      chosen = search(turned, reps, start >= s.n)
    else:
      q = turned.mean(axis=0)
      score = [sum(q[h] @ rep[h] for h in range(HEADS)) for rep in reps]
      chosen = best(score, count) if blocks else []
    far = list(range(first))
    for c in chosen:
      far += range(most_first + c * block, most_first + (c + 1) * block)
    outs = []
    for i in range(start, stop):
      out = []
      for h in range(HEADS):
        g = h // GROUP
        beyond = [*far, *range(rest, i - local + 1)]
        near = list(range(max(i - local + 1, 0), i + 1))
        q = rope(s.q[i, h], local - 1)
        logits = [q @ s.k[j, g] for j in beyond]
        logits += [s.rq[i, h] @ s.rk[j, g] for j in near]
        w = softmax(SCALE * np.array(logits))
        out.append(w @ s.v[[*beyond, *near], g])
        mass[h, near] += w[len(beyond) :]
      outs.append(np.stack(out))
    for c in range(blocks, layout(stop)[1]):
      rows = range(most_first + c * block, most_first + (c + 1) * block)
      reps.append(
        [
          np.mean(
            [s.k[rows[j], h // GROUP] for j in best(mass[h, rows], speakers)],
            axis=0,
          )
          for h in range(HEADS)
        ]
      )
    return np.stack(outs)

  return chunked(s, look)


def landmark_attention(s, m=4):
  """Landmarks at positions 4, 9, ...: blocks of five."""
  w = m + 1
  count = max(half(s.n) // w, 1)

  def look(start, stop):
    return np.stack(
      [np.stack([one(i, h) for h in range(HEADS)]) for i in range(start, stop)]
    )

  def one(i, h):
    g, own, inside = h // GROUP, i // w, i % w
    held = min(count, own)
    q = rope(s.q[i, h], held * w + 1 + inside)
    blocks = best([q @ s.k[b * w + m, g] for b in range(own)], held)
    place = held * w + inside
    logit = lambda j, at: SCALE * rope(s.q[i, h], place) @ rope(s.k[j, g], at)
    near = range(own * w, min(i, own * w + m - 1) + 1)
    joint = [logit(j, held * w + j % w) for j in near]
    joint += [logit(b * w + m, slot * w + m) for slot, b in enumerate(blocks)]
    joint = softmax(joint)
    out = sum(p * s.v[j, g] for p, j in zip(joint, near, strict=False))
    for slot, b in enumerate(blocks):
      inner = softmax([logit(b * w + u, slot * w + u) for u in range(m)])
      out = out + joint[len(near) + slot] * inner @ s.v[b * w : b * w + m, g]
    return out

  return chunked(s, look, chunk=w)


def lococo(s, slots=6, slack=0, block=4, kernel=3):
  made = {k: np.asarray(x, np.float64) for k, x in s.params["cache"].items()}
  caches = [[] for _ in range(GROUPS)]  # (key, value) pairs.

  def look(start, stop):
    mass = [np.zeros(len(c) + stop - start) for c in caches]
    outs = []
    for i in range(start, stop):
      out = []
      for h in range(HEADS):
        g = h // GROUP
        rows = caches[g] + [
          (s.rk[j, g], s.v[j, g]) for j in range(start, i + 1)
        ]
        w = softmax([SCALE * s.rq[i, h] @ k for k, _ in rows])
        mass[g][: len(w)] += w
        out.append(sum(p * v for p, (_, v) in zip(w, rows, strict=True)))
      outs.append(np.stack(out))
    for g in range(GROUPS):
      caches[g] += [(s.rk[j, g], s.v[j, g]) for j in range(start, stop)]
      if len(caches[g]) > slots + slack:
        caches[g] = merge(caches[g], mass[g])
    return np.stack(outs)

  def merge(rows, mass):
    half_ = slots // 2
    order = np.argsort(-mass, kind="stable").tolist()
    heavy, following = sorted(order[:half_]), sorted(order[half_:slots])
    rest = [j for j in range(len(rows)) if j not in heavy]
    x = np.stack([np.concatenate(rows[j]) for j in rest])
    pad = np.concatenate(
      [np.zeros((1, 2 * WIDTH)), x, np.zeros((1, 2 * WIDTH))]
    )
    new = []
    for m in range(half_):
      y = [
        max(
          sum(pad[j + u] @ made["kernel"][u, :, m] for u in range(kernel))
          + made["bias"][m],
          0,
        )
        for j in range(len(rest))
      ]
      w = made["mix"] * softmax(y)
      w[rest.index(following[m])] += 1 - made["mix"]
      new.append((w @ x[:, :WIDTH], w @ x[:, WIDTH:]))
    return [rows[j] for j in heavy] + new

  return chunked(s, look, chunk=block)
