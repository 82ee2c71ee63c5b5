"""Associative recall: pairs planted in noise and asked for at the end.

A text is `context, separator, question, question, ...`: the context is noise
with pairs (key, value) in it; a question is one of its keys, and what is to be
said at it is that key's value. Answers are not part of the text, so that every
question is answered from the context alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Element = dict[str, Any]
# The example number i of a split is drawn with (SPLITS[split], i).
SPLITS = {"train": 0, "test": 1}
TRAIN = 1 << 16


class Text(NamedTuple):
  """A context and what can be asked about it.

  Attributes:
    context: ids, the separator last.
    keys, values: of the pairs, in the order of the text.
    at: places of the keys in the context.
  """

  context: np.ndarray
  keys: np.ndarray
  values: np.ndarray
  at: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recall:
  """Texts of one length; context and number of pairs differ.

  In training the length of the context is log-uniform from `least` to nearly
  all, and the rest is questions: short contexts, which are learned first, get
  most of the questions, and most tokens of a batch are asked about.

  Attributes:
    length: tokens of a text.
    pairs: at most so many are planted.
    keys, values, fillers: ids of each sort; the separator is id 0.
    least: the shortest context.
    heldout: texts that are evaluated.
    ordered: contexts are pairs and nothing else, and each key is another's
      value: which of two neighbours is the key, only their order tells.
  """

  length: int = 128
  pairs: int = 16
  keys: int = 64
  values: int = 64
  fillers: int = 63
  least: int = 8
  heldout: int = 256
  ordered: bool = False

  def __post_init__(self):
    for name in ("pairs", "keys", "values", "fillers", "heldout"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    if self.pairs > self.keys:
      raise ValueError(f"pairs={self.pairs}: there are keys={self.keys} only")
    if not 2 <= self.least <= self.length - 2:
      raise ValueError(f"least={self.least}: must lie in 2..length - 2")

  @property
  def num_classes(self) -> int:
    """Ids there are."""
    return 1 + self.keys + self.values + self.fillers

  def text(
    self,
    rng: np.random.Generator,
    context: int,
    pairs: int,
    depth: float | None = None,
  ) -> Text:
    """Draws a context.

    Args:
      rng: of the draw.
      context: tokens before the separator.
      pairs: how many are planted.
      depth: where the first pair stands, 0 at the beginning and 1 at the end;
        None: anywhere, as the others.

    Raises:
      ValueError: the pairs do not fit.
    """
    if 2 * pairs > context:
      raise ValueError(f"pairs={pairs}: {context} tokens hold {context // 2}")
    keys = 1 + rng.permutation(self.keys)[:pairs]
    if self.ordered:
      # One cycle: without the order, two values are as likely for each key.
      values = np.roll(keys, 1)
    else:
      values = 1 + self.keys + rng.integers(0, self.values, pairs)
    noise = rng.integers(0, self.fillers, context)
    ids = 1 + self.keys + self.values + noise
    # Places of pairs among pairs and noise, each pair being one.
    places = rng.permutation(context - pairs)[:pairs]
    if depth is not None:
      first = round(depth * (context - pairs - 1))
      others = rng.permutation(context - pairs - 1)[: pairs - 1]
      places = np.array([first, *(others + (others >= first))], np.int64)
    # A pair is one longer than its place, so that later ones move.
    at = places + np.argsort(np.argsort(places))
    ids[at], ids[at + 1] = keys, values
    return Text(np.append(ids, 0), keys, values, at)

  def source(self, split: str) -> Sequence[Element]:
    """Seeds; a text is drawn when it is asked for."""
    count = self.heldout if split == "test" else TRAIN
    return [{"seed": (SPLITS[split], i)} for i in range(count)]

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """Another text at every turn."""
    del element
    return self._draw(rng)

  def prepare(self, element: Element) -> Element:
    """ "tokens" and "target" `[length]`, int32; -1 where nothing is asked."""
    return self._draw(np.random.default_rng(element["seed"]))

  def _draw(self, rng: np.random.Generator) -> Element:
    # As many contexts between 8 and 16 tokens as between 64 and 128.
    low, high = np.log(self.least), np.log(self.length - 1)
    context = int(np.exp(rng.uniform(low, high)))
    most = min(self.pairs, context // 2)
    pairs = int(rng.integers(1, most + 1))
    if self.ordered:
      pairs, context = most, 2 * most
    text = self.text(rng, context, pairs)
    asked = rng.integers(0, len(text.keys), self.length - context - 1)
    tokens = np.concatenate([text.context, text.keys[asked]])
    target = np.full(self.length, -1)
    target[context + 1 :] = text.values[asked]
    return {
      "tokens": tokens.astype(np.int32),
      "target": target.astype(np.int32),
    }
