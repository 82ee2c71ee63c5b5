"""Ragged prompts with visual tokens, and models to read them."""


import numpy as np

from tests.decoder.models import config, decoder, params_of, tokens
from tokjax import recipes
from tokjax.budgets import Recycled
from tokjax.models import Generator
from tokjax.tokens import Kind

T, V = Kind.TEXT, Kind.VISUAL
DEPTH, DECODE, LENGTH = 4, 3, 32
KINDS = {
  "long": [T] * 2 + [V] * 20 + [T] * 5,
  "short": [T] + [V] * 11 + [T] * 2,
  "few": [T] * 3 + [V] * 3 + [T] * 3,
  "text": [T] * 5,
  "image": [V] * 9,
}
NAMES = tuple(KINDS)
PROMPTS = {
  name: row[: len(kinds)].tolist()
  for row, (name, kinds) in zip(
    tokens(len(KINDS), LENGTH, seed=5), KINDS.items(), strict=True
  )
}
MORE = tokens(DECODE, len(KINDS), seed=6)

# Budgets that act on images of a few tokens.
OPTIONS = {
  "fastv": {},
  "pyramiddrop": {},
  "sparsevlm": {"budget": Recycled({1: 12, 2: 6})},
  "sparsevlm_plus": {"budget": Recycled({1: 12, 2: 6}, pooled=0.0), "heads": 2},
}


def slots_of(name):
  return recipes.get(name, **OPTIONS[name])


def generator(slots, **changes) -> Generator:
  changes = {"depth": DEPTH, **changes}
  return Generator(
    decoder(slots, **changes), params_of(config(**changes)), capacity=LENGTH,
    decode=DECODE, buckets=(9, LENGTH),
  )  # fmt: skip


def prefilled(made: Generator, names=NAMES):
  """Prompts by name, prefilled as one batch."""
  return made.prefill(
    [PROMPTS[n] for n in names], [KINDS[n] for n in names]
  )


def packed(names=NAMES):
  """Tokens, mask and kinds of a padded batch, `[b, LENGTH]`."""
  shape = (len(names), LENGTH)
  ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  kinds = np.full(shape, int(T), np.int32)
  for i, name in enumerate(names):
    n = len(PROMPTS[name])
    ids[i, :n], mask[i, :n], kinds[i, :n] = PROMPTS[name], True, KINDS[name]
  return ids, mask, kinds
