"""Decoders that prune visual tokens, slowly: one example, loops over tokens.

Written from the official code in its own terms, in float64 NumPy; nothing here
is shared with the library but the names of parameters. A sequence is a list of
`Token`s, a cache a list of entries of one block; nothing is padded, masked or
planned.

FastV: pkunlp-icler/FastV src/FastV/llava-hf, `LlamaModel.fastv_forward`.
PyramidDrop: Cooperx521/PyramidDrop modeling_llama_pdrop.py, `pdrop_forward`
and `pdrop_rank_drop`. SparseVLM (versions 1 and 2): Gumpest/SparseVLMs
modelling_sparse_llama.py, score.py and utils.py.
"""

import dataclasses
import math

import numpy as np

from tokjax.tokens import Kind


@dataclasses.dataclass
class Token:
  """A row of the residual stream; `source` is its place in the prompt."""

  x: np.ndarray
  position: int
  visual: bool
  source: int


@dataclasses.dataclass
class Result:
  """What a prompt became.

  Attributes:
    kept: sources of the visual tokens that each reduction left, in order.
    logits: of the next token, after the prompt and after each decoded one.
    lengths: entries in the cache of each block after the prompt.
    tokens: behind the last block.
  """

  kept: list[list[int]]
  logits: list[np.ndarray]
  lengths: list[int]
  tokens: list[Token]


class Slow:
  """A Llama-like decoder over lists of tokens.

  Args:
    config: a `DecoderConfig`; plain rotary positions, no biases.
    params: its parameters.
  """

  def __init__(self, config, params):
    self.config = config
    as64 = lambda tree: {
      name: as64(x) if isinstance(x, dict) else np.asarray(x, np.float64)
      for name, x in tree.items()
    }
    self.params = as64(params)
    self.caches = [[] for _ in range(config.depth)]

  # Parts of a block.

  def norm(self, x, weights):
    mean = sum(v * v for v in x) / len(x)
    return x / math.sqrt(mean + self.config.epsilon) * weights["scale"]

  def rotated(self, x, position):
    """Heads `[H, D]`: feature i turns with feature i + D/2."""
    half = x.shape[1] // 2
    out = np.empty_like(x)
    for i in range(half):
      angle = position * self.config.rotary.base ** (-i / half)
      c, s = math.cos(angle), math.sin(angle)
      out[:, i] = x[:, i] * c - x[:, i + half] * s
      out[:, i + half] = x[:, i + half] * c + x[:, i] * s
    return out

  def projected(self, token, layer):
    """Rotated query and key and the value of one token."""
    block = self.params[f"block_{layer}"]
    y = self.norm(token.x, block["norm1"])
    d = self.config.features
    q, k, v = (
      (y @ block["attention"][name]["kernel"]).reshape(-1, d)
      for name in ("query", "key", "value")
    )
    return self.rotated(q, token.position), self.rotated(k, token.position), v

  def weights(self, q, position, entries, layer):
    """Attention of one query over entries, `[H, entries]`."""
    heads, group = len(q), self.config.heads // self.config.kv_heads
    window = self.config.window_of(layer)
    out = np.zeros((heads, len(entries)))
    for h in range(heads):
      for n, (k, _, at) in enumerate(entries):
        seen = at <= position
        if window is not None:
          seen = seen and position - at < window
        product = q[h] @ k[h // group] / math.sqrt(self.config.features)
        out[h, n] = math.exp(product) if seen else 0.0
    return out / out.sum(axis=1, keepdims=True)

  def attention_half(self, token, layer):
    """Adds attention to one token, whose entry joins the cache."""
    group = self.config.heads // self.config.kv_heads
    q, k, v = self.projected(token, layer)
    entries = self.caches[layer]
    entries.append((k, v, token.position))
    weight = self.weights(q, token.position, entries, layer)
    mixed = [
      sum(weight[h, n] * entries[n][1][h // group] for n in range(len(entries)))
      for h in range(len(q))
    ]
    out = self.params[f"block_{layer}"]["attention"]["out"]["kernel"]
    return dataclasses.replace(token, x=token.x + np.concatenate(mixed) @ out)

  def mlp_half(self, token, layer):
    block = self.params[f"block_{layer}"]
    y = self.norm(token.x, block["norm2"])
    gate = y @ block["mlp"]["gate"]["kernel"]
    gate = gate / (1 + np.exp(-gate))
    y = (gate * (y @ block["mlp"]["up"]["kernel"])) @ (
      block["mlp"]["down"]["kernel"]
    )
    return dataclasses.replace(token, x=token.x + y)

  def row(self, token, layer, entries):
    """Attention of a token over entries, averaged over heads."""
    q, _, _ = self.projected(token, layer)
    return self.weights(q, token.position, entries, layer).mean(axis=0)

  def logits(self, token):
    x = self.norm(token.x, self.params["norm"])
    return x @ self.params["embed"]["embedding"].T

  def embedded(self, token, position, kind=Kind.TEXT, source=-1):
    x = self.params["embed"]["embedding"][token]
    return Token(x, position, kind == Kind.VISUAL, source)

  # A whole prompt.

  @staticmethod
  def noted(kept, before, after):
    """`after`; what it left of the image is added to `kept`, if it acted."""
    if [t.source for t in before] != [t.source for t in after]:
      kept.append([t.source for t in after if t.visual])
    return after

  def run(self, prompt, kinds, method, more=()):
    """Prefill with a method, then decoding of the tokens `more`."""
    tokens = [
      self.embedded(t, i, kinds[i], i) for i, t in enumerate(prompt)
    ]
    method.start(tokens)
    kept = []
    for layer in range(self.config.depth):
      given = self.noted(kept, tokens, method.before(self, tokens, layer))
      seen = [self.attention_half(token, layer) for token in given]
      few = self.noted(kept, seen, method.between(self, given, seen, layer))
      out = [self.mlp_half(token, layer) for token in few]
      tokens = self.noted(kept, out, method.after(self, given, out, layer))
    logits = [self.logits(tokens[-1])]
    lengths = [len(cache) for cache in self.caches]
    after = tokens
    for i, t in enumerate(more):
      token = self.embedded(t, len(prompt) + i)
      for layer in range(self.config.depth):
        if method.renumbers:
          token.position = len(self.caches[layer])
        token = self.mlp_half(self.attention_half(token, layer), layer)
      logits.append(self.logits(token))
    return Result(kept, logits, lengths, after)


class Plain:
  """Nothing is removed."""

  renumbers = False

  def start(self, tokens):
    """Before the first block."""

  def before(self, model, tokens, layer):
    return tokens

  def between(self, model, given, tokens, layer):
    return tokens

  def after(self, model, given, tokens, layer):
    return tokens


def best(scores, count):
  """Places of the largest scores, the largest first."""
  return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def visual_places(tokens):
  return [i for i, token in enumerate(tokens) if token.visual]


def renumbered(tokens):
  return [
    dataclasses.replace(token, position=i) for i, token in enumerate(tokens)
  ]


class FastV(Plain):
  """K and R of the paper; the fraction R of the visual tokens goes."""

  def __init__(self, k, r):
    self.k, self.r = k, r

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer != self.k or not image:
      return tokens
    return [t for i, t in enumerate(tokens) if i not in self.gone(image)]

  def gone(self, image):
    row = [self.row[i] for i in image]
    keep = best(row, round(len(image) * (1 - self.r)))
    return {image[i] for i in range(len(image)) if i not in keep}

  def after(self, model, given, tokens, layer):
    if layer == self.k - 1:
      self.row = model.row(given[-1], layer, model.caches[layer])
    return tokens


class MaskedFastV(FastV):
  """FastV's first form: what goes is hidden from the others, not removed."""

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer != self.k or not image:
      return tokens
    gone = self.gone(image)
    # Nothing that stays is behind them, so that nothing sees them.
    return [
      dataclasses.replace(t, position=10**4 + i) if i in gone else t
      for i, t in enumerate(tokens)
    ]


class Top(Plain):
  """Keeps a share of the tokens of a kind at one place of one block.

  Args:
    place: "between" attention and MLP or "after" the block.
    layer: of the block, whose attention from the last token ranks.
    visual: whether the image or the text is reduced.
    share: of the initial tokens of the kind.
    last: so many of them at the end stay in any case, and do not count.
  """

  def __init__(self, place, layer, visual, share, last=0):
    self.place, self.layer, self.visual = place, layer, visual
    self.share, self.last = share, last

  def start(self, tokens):
    self.initial = sum(t.visual == self.visual for t in tokens)

  def between(self, model, given, tokens, layer):
    if (self.place, self.layer) != ("between", layer):
      return tokens
    return self.top(model, given, tokens)

  def after(self, model, given, tokens, layer):
    if (self.place, self.layer) != ("after", layer):
      return tokens
    return self.top(model, given, tokens)

  def top(self, model, given, tokens):
    row = model.row(given[-1], self.layer, model.caches[self.layer])
    free = [i for i, t in enumerate(tokens) if t.visual == self.visual]
    free = free[: len(free) - self.last]
    count = min(round(self.initial * self.share), len(free))
    keep = {free[i] for i in best([row[i] for i in free], count)}
    gone = set(free) - keep
    return [t for i, t in enumerate(tokens) if i not in gone]


class Both(Plain):
  """One method after the other at every place."""

  def __init__(self, first, second):
    self.first, self.second = first, second

  def start(self, tokens):
    self.first.start(tokens)
    self.second.start(tokens)

  def between(self, model, given, tokens, layer):
    tokens = self.first.between(model, given, tokens, layer)
    return self.second.between(model, given, tokens, layer)

  def after(self, model, given, tokens, layer):
    tokens = self.first.after(model, given, tokens, layer)
    return self.second.after(model, given, tokens, layer)


class Bypass(Plain):
  """Some blocks see the tokens with the longest states; the rest wait."""

  def __init__(self, first, stop, share):
    self.first, self.stop, self.share = first, stop, share

  def before(self, model, tokens, layer):
    if layer != self.first:
      return tokens
    self.waiting = tokens
    norms = [t.x @ t.x for t in tokens]
    keep = best(norms, max(1, round(len(tokens) * self.share)))
    return [tokens[i] for i in sorted(keep)]

  def after(self, model, given, tokens, layer):
    if layer != self.stop - 1:
      return tokens
    done = {t.source: t for t in tokens}
    return [done.get(t.source, t) for t in self.waiting]


class PyramidDrop(Plain):
  """Layers, and the share of the initial visual tokens that each one leaves."""

  renumbers = True

  def __init__(self, layers, ratios):
    self.ratios = dict(zip(layers, ratios, strict=True))

  def start(self, tokens):
    self.initial = len(visual_places(tokens))

  def before(self, model, tokens, layer):
    image = visual_places(tokens)
    if layer not in self.ratios or not image:
      return tokens
    entries = []
    for token in tokens:
      _, k, v = model.projected(token, layer)
      entries.append((k, v, token.position))
    row = model.row(tokens[-1], layer, entries)
    count = int(self.initial * self.ratios[layer])
    keep = {image[i] for i in best([row[i] for i in image], count)}
    gone = set(image) - keep
    return renumbered([t for i, t in enumerate(tokens) if i not in gone])


class SparseVLM(Plain):
  """Version 1: layers, and the table of how many tokens stay there."""

  renumbers = True

  def __init__(self, layers, table):
    self.table = dict(zip(layers, table, strict=True))

  def start(self, tokens):
    image = visual_places(tokens)
    self.raters = []
    if not image:
      return
    text = list(tokens[image[-1] + 1 :])
    total = np.zeros(len(text))
    for i in image:
      product = np.array([tokens[i].x @ t.x for t in text])
      share = np.exp(product - product.max()) if len(text) else product
      total += share / share.sum()
    total /= len(image)
    self.raters = [
      t.source for t, value in zip(text, total, strict=True)
      if value > total.mean()
    ]  # fmt: skip

  def after(self, model, given, tokens, layer):
    image = visual_places(given)
    if layer not in self.table or not image:
      return tokens
    rows = [
      model.row(token, layer, model.caches[layer])
      for token in given
      if token.source in self.raters
    ]
    score = [np.mean([row[i] for row in rows]) for i in image]
    stay = best(score, min(self.table[layer], len(image) - 1))
    gone = [i for i in range(len(image)) if i not in stay]
    pool = best([score[i] for i in gone], int(len(gone) * 0.3) + 1)
    pool = [tokens[image[gone[i]]] for i in pool]
    made = clusters(pool, int(len(pool) / 10) + 1)
    first, last = image[0], image[-1]
    kept = [tokens[image[i]] for i in sorted(stay)]
    return renumbered(
      [*tokens[:first], *kept, *made, *tokens[last + 1 :]]
    )


class SparseVLMPlus(SparseVLM):
  """Version 2: some heads, attention over what ones would have; no clusters."""

  renumbers = False

  def __init__(self, layers, table, heads):
    super().__init__(layers, table)
    self.heads = heads

  def after(self, model, given, tokens, layer):
    image = visual_places(given)
    if layer not in self.table or not image:
      return tokens
    rows = []
    for token in given:
      if token.source in self.raters:
        q, _, _ = model.projected(token, layer)
        row = model.weights(q, token.position, model.caches[layer], layer)
        ones = [self.of_ones(model, token, given[i]) for i in image]
        rows.append(row[:, image] / np.array(ones))
    rows = np.array(rows)
    heads = best([rows[:, h].sum() for h in range(rows.shape[1])], self.heads)
    score = rows[:, heads].mean(axis=(0, 1))
    stay = best(score, min(self.table[layer], len(image) - 1))
    gone = {image[i] for i in range(len(image)) if i not in stay}
    return [t for i, t in enumerate(tokens) if i not in gone]

  def of_ones(self, model, query, key):
    """The scaled product of a query and a key of ones at two places."""
    one = np.ones((1, model.config.features))
    product = model.rotated(one, query.position) * model.rotated(
      one, key.position
    )
    return product.sum() / math.sqrt(model.config.features)


def clusters(pool, count):
  """Density peaks of tokens, the highest first; means of their members."""
  n, width = len(pool), len(pool[0].x)
  apart = np.array(
    [[np.linalg.norm(a.x - b.x) / math.sqrt(width) for b in pool] for a in pool]
  )
  density = [
    math.exp(-np.mean([d * d for d in sorted(apart[i])[:count]]))
    for i in range(n)
  ]
  peak = []
  for i in range(n):
    denser = [apart[i, j] for j in range(n) if density[j] > density[i]]
    peak.append(density[i] * min([*denser, apart.max()]))
  centres = best(peak, count)
  members = [[] for _ in centres]
  for i in range(n):
    nearest = min(range(count), key=lambda c: apart[i, centres[c]])
    if i in centres:
      nearest = centres.index(i)
    members[nearest].append(pool[i].x)
  return [
    dataclasses.replace(pool[c], x=np.mean(xs, axis=0))
    for c, xs in zip(centres, members, strict=True)
  ]
