"""Methods that change what prompts see, or what is made of it."""

import math

import numpy as np

from tests.cache.cases import DEPTH, HEADS, STEPS, WIDTH
from tests.cache.reference.layer_input import GROUP, SCALE, softmax
from tests.cache.reference.rules import full


def head_masks(s, masks):
  """Prompt where query head h sees what `masks[h][i, j]` and causality say."""
  outs = []
  for i in range(s.n):
    out = []
    for h in range(HEADS):
      out.append(s.head(h, i, [j for j in range(i + 1) if masks[h][i, j]]))
    outs.append(np.stack(out))
  return np.stack(outs)


def minference_vertical_slash(s, block=4):
  count = max(int(s.n * 0.25), 1)
  masks = []
  for h in range(HEADS):
    column, slash = np.zeros(s.n), np.zeros(s.n)
    for i in range(max(s.n - 4, 0), s.n):
      for j, w in enumerate(s.weights(h, i, range(i + 1))):
        column[j] += w
        slash[i - j] += w
    columns = forced_best(column, max(count, 2), 2)
    offsets = forced_best(slash, max(count, 3), 3)

    def seen(i, j, columns=columns, offsets=offsets):
      apart = (i // block - j // block) * block
      return j in columns or any(abs(o - apart) < block for o in offsets)

    masks.append(
      np.array([[seen(i, j) for j in range(s.n)] for i in range(s.n)])
    )
  return head_masks(s, masks), full(s)[1]


def forced_best(score, count, forced):
  """The first `forced` ones first, then the best, `count` in all."""
  score = score.copy()
  score[:forced] = np.inf
  return set(np.argsort(-score, kind="stable")[:count].tolist())


def xattention(s, mass=0.6, stride=2, block=4):
  size = -(-s.n // block) * block
  masks = []
  for h in range(HEADS):
    q, k = np.zeros((2, size, WIDTH))
    q[: s.n], k[: s.n] = s.rq[: s.n, h], s.rk[: s.n, h // GROUP]
    blocks = np.zeros((size // block, size // block))
    for a in range(-(-s.n // stride)):
      sums = []
      for c in range(a + 1):
        sums.append(
          sum(
            q[a * stride + stride - 1 - u] @ k[c * stride + u]
            for u in range(stride)
          )
        )
      for c, w in enumerate(softmax(np.array(sums) * SCALE / stride)):
        blocks[a * stride // block, c * stride // block] += w
    seen = np.zeros((s.n, s.n), bool)
    for row in range(len(blocks)):
      chosen = {0, row}
      held = sum(blocks[row, c] for c in chosen)
      for c in np.argsort(-blocks[row, : row + 1], kind="stable"):
        if int(c) in chosen:
          continue
        if held >= mass * blocks[row].sum():
          break
        chosen.add(int(c))
        held += blocks[row, c]
      for c in chosen:
        seen[row * block : (row + 1) * block, c * block : (c + 1) * block] = (
          True
        )
    masks.append(seen)
  return head_masks(s, masks), full(s)[1]


# What is changed after the softmax.


def reweighted(s, change):
  """All tokens, with `change(h, i, weights)` of every row."""
  outs = []
  for i in range(s.n + STEPS):
    out = []
    for h in range(HEADS):
      w = change(h, i, s.weights(h, i, range(i + 1)))
      out.append(w @ s.v[: i + 1, h // GROUP])
    outs.append(np.stack(out))
  return np.stack(outs[: s.n]), np.stack(outs[s.n :])


def act(s, beta=0.4, alpha=0.1):
  if s.layer == DEPTH - 1:
    return full(s)
  sinks = []
  for h in range(HEADS):
    total = np.zeros(s.n)
    for i in range(s.n):
      total[: i + 1] += s.weights(h, i, range(i + 1))
    mean = total / (s.n - np.arange(s.n))
    sinks.append([j for j in range(s.n) if mean[j] > alpha][1:])

  def change(h, i, w):
    bad = [j for j in sinks[h] if j <= i]
    good = [j for j in range(i + 1) if j not in bad]
    freed = (1 - beta) * w[bad].sum()
    w = w.copy()
    w[good] += freed * w[good] / w[good].sum()
    w[bad] *= beta
    return w

  return reweighted(s, change)


def zerotuning(s, gamma=1.2):
  def change(h, i, w):
    w = w.copy()
    w[0] *= gamma
    return w / w.sum()

  return reweighted(s, change)


def gated_attention(s):
  kernel = np.asarray(s.params["attend"]["kernel"], np.float64)
  gate = 1 / (1 + np.exp(-np.einsum("nw,whd->nhd", s.x, kernel)))
  prompt, steps = full(s)
  return prompt * gate[: s.n], steps * gate[s.n :]


def lightning_attention(s):
  """No positions; a layer norm over all heads; then the gate."""
  silu = lambda x: x / (1 + np.exp(-x))
  made = {k: np.asarray(v, np.float64) for k, v in s.params["attend"].items()}
  state = np.zeros((HEADS, WIDTH, WIDTH))
  outs = []
  for i in range(s.n + STEPS):
    out = np.zeros((HEADS, WIDTH))
    for h in range(HEADS):
      slope = 2 ** (-8 * (h + 1) / HEADS)
      decay = math.exp(-slope * (1 - s.layer / (DEPTH - 1) + 1e-5))
      k, v = silu(s.k[i, h // GROUP]), silu(s.v[i, h // GROUP])
      state[h] = decay * state[h] + np.outer(k, v)
      out[h] = silu(s.q[i, h]) @ state[h]
    out = (out - out.mean()) / np.sqrt(out.var() + 1e-5)
    out = out * made["scale"] + made["bias"]
    gate = np.einsum("r,rhd->hd", s.x[i] @ made["down"], made["up"])
    outs.append(out / (1 + np.exp(-gate)))
  return np.stack(outs[: s.n]), np.stack(outs[s.n :])
