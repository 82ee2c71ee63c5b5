"""More methods for the slow decoder, and a slow encoder that is cut.

Written from the official code, in float64 NumPy, for one example; see
`tests.multimodal.reference`. Where the official code is undefined (no words, no
contextual tokens) the rule of the recipe's docstring is written down.

VisionDrop: Ruixxxx/VisionDrop modeling_llama_visiondrop.py. DART:
xqy1111111/DART modeling_llama_self.py. CDPruner: Theia-4869/CDPruner
llava_arch.py. MMTok: Ironieser/MMTok semantic_selector.py. AIM: LaVi-Lab/AIM
modeling_qwen2.py. SCM: Yuliang-Liu/Monkey modeling_minimonkey_chat.py. FlowCut:
TungChintao/FlowCut modeling_clip_flowcut.py and utils_flowcut.py.
"""

import dataclasses
import math

import numpy as np

from tests.multimodal.reference import (
  Plain,
  Slow,
  best,
  renumbered,
  visual_places,
)
from tokjax.tokens import Kind


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def stay(tokens, kept):
  """Without the visual tokens that are not at the places `kept`."""
  return [t for i, t in enumerate(tokens) if not t.visual or i in set(kept)]


def words(tokens):
  """Hidden states of what stands behind the image."""
  image = visual_places(tokens)
  return [t.x for t in tokens[image[-1] + 1 :]]


class VisionDrop(Plain):
  """Blocks and the share of the initial visual tokens that each one leaves."""

  renumbers = True

  def __init__(self, shares):
    self.shares = shares

  def start(self, tokens):
    self.initial = len(visual_places(tokens))

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer not in self.shares or not image:
      return tokens
    entries = []
    for token in tokens:
      _, k, v = model.projected(token, layer)
      entries.append((k, v, token.position))
    rows = [model.row(tokens[i], layer, entries) for i in image]
    score = np.mean(rows, axis=0)[image]
    metric = unit(np.stack([entries[i][0].mean(axis=0) for i in image]))
    count = max(1, int(self.initial * self.shares[layer]))
    contextual = (count + 1) * 5 // 32
    dominant = sorted(best(score, count - contextual))
    rest = [i for i in range(len(image)) if i not in dominant]
    step = max(1, len(rest) // max(contextual, 1))
    targets = rest[::step][:contextual]
    members = {t: [] for t in targets}
    for i in rest:
      if targets and i not in targets:
        nearest = int(np.argmax([metric[i] @ metric[t] for t in targets]))
        members[targets[nearest]].append(tokens[image[i]].x)
    merged = []
    for t, own in members.items():
      token = tokens[image[t]]
      mean = np.mean(own, axis=0) if own else 0.0
      merged.append(dataclasses.replace(token, x=token.x + mean))
    kept = [tokens[image[i]] for i in dominant]
    first, last = image[0], image[-1]
    return renumbered([*tokens[:first], *kept, *merged, *tokens[last + 1 :]])


class Dart(Plain):
  """At the input of block `k`, with so many visual and textual pivots."""

  def __init__(self, k, keep, visual, text):
    self.k, self.keep, self.visual, self.text = k, keep, visual, text

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer != self.k or not image:
      return tokens
    each = self.visual + self.text
    count = int(len(image) * self.keep / each) * each + self.visual
    length = [np.abs(k).sum() for k, _, _ in model.caches[layer - 1]]
    after = range(image[-1] + 1, len(tokens))
    pivots = [image[i] for i in best([length[i] for i in image], self.visual)]
    pivots = pivots[:count]
    kept = list(pivots)
    pivots += [
      after[i] for i in best([length[i] for i in after], self.text)
    ]
    left, x = count - len(kept), unit(np.stack([t.x for t in tokens]))
    for number, pivot in enumerate(pivots):
      open_ = [i for i in image if i not in kept]
      topk = left // len(pivots) + (number < left % len(pivots))
      least = best([-(x[pivot] @ x[i]) for i in open_], topk)
      kept += [open_[i] for i in least]
    return stay(tokens, kept)


class EfficientVLA(Plain):
  """At the input of block `k`; from the paper, `sent` as its formula says."""

  def __init__(self, k, keep, key, share, sent):
    self.k, self.keep, self.key, self.share = k, keep, key, share
    self.sent = sent

  def after(self, model, given, tokens, layer):
    if layer == self.k - 1:
      rows = [model.row(t, layer, model.caches[layer]) for t in given]
      text = [i for i, t in enumerate(given) if not t.visual]
      self.score = np.array([
        sum(rows[i][j] if self.sent else rows[j][i] for j in text)
        for i in range(len(given))
      ])
    return tokens

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    count = max(1, round(len(image) * self.keep))
    if layer != self.k or not image or count == len(image):
      return tokens
    ranked = [image[i] for i in best(self.score[image], len(image))]
    key = ranked[: min(self.key, count)]
    kept = ranked[: len(key) + int((count - len(key)) * self.share)]
    x = unit(np.stack([t.x for t in tokens]))
    others = [i for i in image if i not in kept]
    apart = [1 - max(x[i] @ x[j] for j in key) for i in others]
    far = [others[i] for i in best(apart, count - len(kept))]
    return stay(tokens, kept + far)


class BeforeAll(Plain):
  """Visual tokens are chosen at the input, by their share."""

  renumbers = True

  def __init__(self, share):
    self.share = share

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer or not image:
      return tokens
    count = max(1, round(len(image) * self.share))
    if count == len(image):
      return tokens
    x = np.stack([tokens[i].x for i in image])
    text = np.array(words(tokens)).reshape(-1, x.shape[1])
    chosen = self.chosen(x, text, count)
    return renumbered(stay(tokens, [image[i] for i in chosen]))


class CDPruner(BeforeAll):
  def chosen(self, x, text, count):
    similar = unit(x) @ unit(x).T
    np.fill_diagonal(similar, 1.0)
    weight = np.ones(len(x))
    if len(text):
      cosine = -(unit(x) @ unit(text).T).mean(axis=1)
      weight = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    kernel = weight[:, None] * similar * weight[None]
    rows, left, picked = np.zeros((count, len(x))), np.diag(kernel).copy(), []
    for i in range(count):
      j = int(np.argmax(left))
      picked.append(j)
      own = (kernel[j] - rows[:i, j] @ rows[:i]) / math.sqrt(left[j])
      rows[i] = own
      left = left - own**2
      left[j] = -np.inf
    return picked


class MMTok(BeforeAll):
  def chosen(self, x, text, count):
    def spread(a, b, temperature):
      logits = unit(a) @ unit(b).T / temperature
      weight = np.exp(logits - logits.max(axis=1, keepdims=True))
      return weight / weight.sum(axis=1, keepdims=True) / len(a)

    worth = [0.5 * spread(x, x, 0.2)]
    if len(text):
      worth = [spread(text, x, 0.02), *worth]
    worth = np.concatenate(worth)
    covered, picked = np.zeros(len(worth)), []
    for _ in range(count):
      gain = np.maximum(worth - covered[:, None], 0).sum(axis=0)
      gain[picked] = -np.inf
      picked.append(int(np.argmax(gain)))
      covered = np.maximum(covered, worth[:, picked[-1]])
    return picked


class AIM(Plain):
  """Blocks and the share of the initial visual tokens that is seen behind."""

  def __init__(self, shares):
    self.shares = shares

  def start(self, tokens):
    self.initial = len(visual_places(tokens))

  def after(self, model, given, tokens, layer):
    image = visual_places(given)
    if layer not in self.shares or not image:
      return tokens
    n, heads = len(given), model.config.heads
    group = heads // model.config.kv_heads
    chance = np.zeros((heads, n, n))
    for i, token in enumerate(given):
      q, _, _ = model.projected(token, layer)
      for h in range(heads):
        for j, (k, _, at) in enumerate(model.caches[layer]):
          if at <= token.position:
            product = q[h] @ k[h // group] / math.sqrt(model.config.features)
            chance[h, i, j] = math.exp(product / 0.1)
    chance /= chance.sum(axis=2, keepdims=True)
    dist = np.full((heads, 1, n), 1 / n)
    for _ in range(5):
      dist = dist @ chance
    score = np.sqrt((dist**2).mean(axis=0))[0]
    count = max(1, int(self.initial * self.shares[layer]))
    keep = best([score[i] for i in image], count)
    return stay(tokens, [image[i] for i in keep])


def scm(config, params, prompt, kinds, first=0, last=0):
  """Places of the prompt that remain, by the attention of block 1."""
  model, seen = Slow(config, params), {}

  class Look(Plain):
    def after(self, model, given, tokens, layer):
      if layer == 1:
        rows = [model.row(t, layer, model.caches[layer]) for t in given]
        seen["rows"] = np.stack(rows)
      return tokens

  model.run(prompt, kinds, Look())
  image = [i for i, kind in enumerate(kinds) if kind == Kind.VISUAL]
  ours = image[first : len(image) - last]
  if not ours:
    return list(range(len(prompt)))
  score = seen["rows"][ours[-1] + 1 :].mean(axis=0)[ours]
  keep = {ours[i] for i in best(score, max(1, int(len(ours) * 0.5)))}
  return [i for i in range(len(prompt)) if i not in ours or i in keep]


def flowcut(params, x, heads, final, epsilon):
  """An encoder whose patches are cut in every second block.

  Args:
    params: of its blocks.
    x: tokens, the class token first, `[n, d]`.
    heads: of a block.
    final: patches that remain in the end.
    epsilon: of the norms.

  Returns:
    Tokens behind the last block, and the number of patches behind each block.
  """
  depth, scores, counts = len(params), None, []

  def norm(x, own):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * own["scale"] + own["bias"]

  def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)

  for layer in range(depth):
    own = params[f"block_{layer}"]
    y = norm(x, own["norm1"])
    q, k, v = (
      (y @ own["attention"][name]["kernel"] + own["attention"][name]["bias"])
      .reshape(len(x), heads, -1)
      .transpose(1, 0, 2)
      for name in ("query", "key", "value")
    )
    weight = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
    semantic = softmax((v[:, :1] @ v.transpose(0, 2, 1))[:, 0]).mean(axis=0)[1:]
    out = (weight @ v).transpose(1, 0, 2).reshape(len(x), -1)
    out = out @ own["attention"]["out"]["kernel"]
    x = x + out + own["attention"]["out"]["bias"]
    y = norm(x, own["norm2"]) @ own["mlp"]["fc1"]["kernel"]
    y = y + own["mlp"]["fc1"]["bias"]
    y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    x = x + y @ own["mlp"]["fc2"]["kernel"] + own["mlp"]["fc2"]["bias"]
    if len(x) > final + 1:
      row, value = weight[:, 0, 1:].mean(axis=0), v.mean(axis=0)[1:]
      share = row / row.sum()
      now = (share + semantic / semantic.sum()) * np.abs(value).sum(axis=1)
      scores = now if scores is None else 0.5 * scores + 0.5 * now
      left = depth - 1 - layer - 1
      if left % 2 == 0 and left >= 0:
        n = len(row)
        entropy = -(share * np.log(share)).sum() / np.log(n)
        gone = len(x)
        if left:
          gone = round((n - final) / left**0.5 * (1 - entropy**2))
        keep = sorted(best(scores, max(len(x) - gone, final + 1) - 1))
        x, scores = np.concatenate([x[:1], x[1:][keep]]), scores[keep]
    counts.append(len(x) - 1)
  return x, counts
