"""More methods for the slow decoder; see `tests.multimodal.reference`.

TransPrune: liaolea/TransPrune modeling_llama_transprune.py. MustDrop:
liuting20/MustDrop local_merge.py and modelling_sparse_llama.py. TRIM:
FreedomIntelligence/TRIM clip_encoder.py.
"""

import dataclasses
import math

import numpy as np

from tests.multimodal.reference import (
  Plain,
  best,
  renumbered,
  visual_places,
)
from tests.multimodal.reference_selection import stay, words


def transitions(before, after):
  """Of one sub-layer: the stretch of each token, weighted by its turn."""
  turns = [
    1 - u @ o / (np.linalg.norm(u) * np.linalg.norm(o))
    for u, o in zip(before, after, strict=True)
  ]
  total = sum(math.exp(turn) for turn in turns)
  return [
    np.linalg.norm(o) / np.linalg.norm(u) * math.exp(turn) / total
    for u, o, turn in zip(before, after, turns, strict=True)
  ]


def rows_ahead(model, tokens, layer, queries):
  """Attention of some tokens in the block that all of them enter next."""
  entries = []
  for token in tokens:
    _, k, v = model.projected(token, layer)
    entries.append((k, v, token.position))
  return [model.row(token, layer, entries) for token in queries]


class TransPrune(Plain):
  """Blocks, the shares that remain at their inputs, and the first counted."""

  renumbers = True

  def __init__(self, shares, since):
    self.shares, self.since = shares, since

  def start(self, tokens):
    self.initial = len(visual_places(tokens))
    self.sums = {t.source: 0.0 for t in tokens}

  def count(self, model, before, after, layer, norm):
    if layer < self.since:
      return
    weights = model.params[f"block_{layer}"][norm]
    normed = [model.norm(t.x, weights) for t in before]
    added = [b.x - a.x for a, b in zip(before, after, strict=True)]
    found = transitions(normed, added)
    for token, value in zip(before, found, strict=True):
      self.sums[token.source] += value

  def between(self, model, given, tokens, layer):
    self.count(model, given, tokens, layer, "norm1")
    self.seen = tokens
    return tokens

  def after(self, model, given, tokens, layer):
    self.count(model, self.seen, tokens, layer, "norm2")
    return tokens

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer not in self.shares or not image:
      return tokens
    text = tokens[image[-1] + 1 :]
    rows = [row[image] for row in rows_ahead(model, tokens, layer, text)]
    moved = np.array([self.sums[tokens[i].source] for i in image])
    score = moved / (moved.sum() + 1e-8)
    if rows:
      attended = np.mean(rows, axis=0)
      score = score + attended / (attended.sum() + 1e-8)
    count = max(1, int(self.initial * self.shares[layer]))
    kept = [image[i] for i in best(list(score), count)]
    return renumbered(stay(tokens, kept))


class Trim(Plain):
  """At the input; a count of outputs, or at most so many and outliers only."""

  renumbers = True

  def __init__(self, share, adaptive, cosine=False):
    self.share, self.adaptive, self.cosine = share, adaptive, cosine

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer or not image:
      return tokens
    count = max(1, round(len(image) * self.share))
    if count == len(image):
      return tokens
    x = np.stack([tokens[i].x for i in image])
    text = words(tokens)
    mean = np.mean(text, axis=0) if text else np.zeros(x.shape[1])
    product = x @ mean
    if self.cosine and text:
      product /= np.linalg.norm(x, axis=1) * np.linalg.norm(mean)
    score = np.exp(-product - (-product).max())
    score /= score.sum()
    many = count - 1
    if self.adaptive:
      low, high = np.percentile(score, 25), np.percentile(score, 75)
      many = min(many, int((score > high + 1.5 * (high - low)).sum()))
    kept = sorted(best(list(score), many))
    rest = [i for i in range(len(image)) if i not in kept]
    first, last = image[0], image[-1]
    merged = dataclasses.replace(
      tokens[image[rest[0]]], x=x[rest].mean(axis=0)
    )
    return renumbered([
      *tokens[:first], *(tokens[image[i]] for i in kept), merged,
      *tokens[last + 1 :],
    ])  # fmt: skip


class Csp(Plain):
  """So many evenly spaced tokens, all of them from a block on, then a share."""

  def __init__(self, count, until, block, share):
    self.count, self.until, self.block, self.share = count, until, block, share

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if not image:
      return tokens
    if layer == 0:
      self.waiting, n = tokens, len(image)
      if self.count >= n:
        return tokens
      step = n // self.count
      return stay(tokens, [image[i * step] for i in range(self.count)])
    if layer == self.until:
      done = {t.source: t for t in tokens}
      tokens = [done.get(t.source, t) for t in self.waiting]
      image = visual_places(tokens)
    if layer == self.block:
      (row,) = rows_ahead(model, tokens, layer, tokens[-1:])
      kept = best(list(row[image]), max(1, round(len(image) * self.share)))
      tokens = stay(tokens, [image[i] for i in kept])
    return tokens


class MustDrop(Plain):
  """Blocks and the room there; `key` is a number for each place of a prompt."""

  renumbers = True

  def __init__(self, room, key, share, together, alone):
    self.room, self.key, self.share = room, key, share
    self.together, self.alone = together, alone

  def start(self, tokens):
    image = visual_places(tokens)
    self.initial = len(image)
    count = math.ceil(self.share * len(image))
    best_of = best([self.key[tokens[i].source] for i in image], count)
    self.spared = {tokens[image[i]].source for i in best_of}

  def after(self, model, given, tokens, layer):
    image = visual_places(given)
    if layer not in self.room or not image:
      return tokens
    rows = np.array([
      model.row(t, layer, model.caches[layer])[image]
      for t in given[image[-1] + 1 :]
    ])
    if len(rows) == 0:
      rows = np.zeros((1, len(image)))
    total = rows.sum(axis=0)
    drop = (total < total.sum() * self.together) & (
      rows.max(axis=0) < self.alone
    )
    spared = np.array([given[i].source in self.spared for i in image])
    stays = [i for i in range(len(image)) if spared[i] or not drop[i]]
    count = max(1, int(self.initial * self.room[layer]))
    if len(stays) > count:
      worth = np.where(spared, np.inf, total)
      stays = [stays[i] for i in best([worth[i] for i in stays], count)]
    return renumbered(stay(tokens, [image[i] for i in stays]))


class AllOrNone(Plain):
  """ToDRE's second stage: all visual tokens go behind a block, or none."""

  def __init__(self, layer, least):
    self.layer, self.least = layer, least

  def after(self, model, given, tokens, layer):
    image = visual_places(given)
    text = given[image[-1] + 1 :] if image else []
    if layer != self.layer or not text:
      return tokens
    rows = [model.row(t, layer, model.caches[layer]) for t in text]
    mass = sum(row[i] for row in rows for i in image)
    whole = sum(row.sum() for row in rows)
    return tokens if mass / whole >= self.least else stay(tokens, [])


def merged_windows(x, side, grid, threshold, keep):
  """Means of windows of similar tokens, then the others, MustDrop.

  Args:
    x: tokens of a grid, `[n, d]`.
    side: of a window.
    grid: sides of the grid.
    threshold: of the mean cosine within a window.
    keep: at most so many tokens remain.
  """
  rows, columns = grid
  windows = [
    [
      (r + i) * columns + c + j for i in range(side) for j in range(side)
    ]
    for r in range(0, rows, side)
    for c in range(0, columns, side)
  ]
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  alike = []
  for own in windows:
    pairs = [unit[i] @ unit[j] for i in own for j in own if i != j]
    alike.append(np.mean(pairs))
  count = sum(value >= threshold for value in alike)
  count = max(count, -(-(len(x) - keep) // (side * side - 1)))
  merged = [windows[w] for w in best(alike, count)]
  gone = {i for own in merged for i in own}
  rest = [i for i in range(len(x)) if i not in gone]
  return np.array([*(x[own].mean(axis=0) for own in merged), *x[rest]])
