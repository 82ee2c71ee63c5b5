"""CATP: prompts of examples against a slow decoder, and its card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.decoder.models import config, params_of, tokens
from tests.multimodal import reference
from tests.multimodal.reference_selection import stay, unit
from tokjax import diversity, recipes
from tokjax.models.decoder import Decoder
from tokjax.tokens import Kind

T, V = Kind.TEXT, Kind.VISUAL
DEPTH, LAYER, KEEP, LENGTH = 4, 1, 0.4, 40
KINDS = {
  "three": [T] + [V] * 9 + [T] * 3 + [V] * 8 + [T] * 2 + [V] * 9 + [T] * 3,
  "two": [V] * 10 + [T] * 2 + [V] * 7 + [T],
  "one": [T] * 2 + [V] * 11 + [T] * 2,
  "text": [T] * 6,
}
NAMES = tuple(KINDS)
PROMPTS = {
  name: row[: len(kinds)].tolist()
  for row, (name, kinds) in zip(
    tokens(len(KINDS), LENGTH, seed=8), KINDS.items(), strict=True
  )
}


def samples_of(given):
  """Places of the tokens of each sample: an image and the text behind it."""
  found = []
  for i, token in enumerate(given):
    if token.visual and (i == 0 or not given[i - 1].visual):
      found.append([])
    if found:
      found[-1].append(i)
  return found


def greedy(x, text, count, weight):
  """Facility location of (1 + cosine) / 2, with the text's likeness on top."""
  half = lambda a, b: (1 + a @ b) / 2
  picked = []
  for _ in range(count):
    gains = []
    for j in range(len(x)):
      chosen = [*picked, j]
      cover = sum(max(half(x[y], row) for y in chosen) for row in x)
      likeness = len(chosen) / 2
      if text is not None:
        likeness = sum(half(x[y], text) for y in chosen)
      gains.append(-np.inf if j in picked else cover + weight * likeness)
    picked.append(int(np.argmax(gains)))
  return picked


class Catp(reference.Plain):
  """`keep` of the visual tokens at the end, the context behind `layer`."""

  def __init__(self, keep, layer, words=0.7, query=0.6):
    self.keep, self.layer, self.words, self.query = keep, layer, words, query

  def before(self, model, given, layer):
    own = samples_of(given)
    if layer or not own:
      return given
    self.initial = sum(t.visual for t in given)
    due = int(self.initial * (1 + self.keep) / 2 + 1e-6)
    kept, upto = [], 0
    for places in own:
      image = [i for i in places if given[i].visual]
      text = [given[i].x for i in places if not given[i].visual]
      low = due * upto // self.initial
      upto += len(image)
      count = due * upto // self.initial - low
      x = unit(np.stack([given[i].x for i in image]))
      mean = unit(np.mean(text, axis=0)) if text else None
      kept += [image[i] for i in greedy(x, mean, count, self.words)]
    return stay(given, kept)

  def after(self, model, given, done, layer):
    own = samples_of(done)
    if not own:
      return done
    row = model.row(given[-1], layer, model.caches[layer])
    before, self.row = getattr(self, "row", None), row
    x = unit(np.stack([t.x for t in done]))
    mean = lambda at: unit(np.mean([done[i].x for i in at], axis=0))
    image = [i for places in own for i in places if done[i].visual]
    asked = [i for i in own[-1] if done[i].visual]
    context = [i for i in image if i not in asked]
    if layer == self.layer:
      cosine, rise = x @ mean(own[-1]), np.maximum(row - before, 0)
      many = int(len(context) * 2 * self.keep / (1 + self.keep) + 1e-4)
      score = [rise[i] + self.query * cosine[i] for i in context]
      best = [context[i] for i in reference.best(score, many)]
      room = int(self.initial * (0.25 + 0.75 * self.keep) + 1e-6)
      order = reference.best([cosine[i] for i in asked], room - len(best))
      return stay(done, [*best, *(asked[i] for i in order)])
    if layer == self.layer + 1:
      told = [i for places in own[:-1] for i in places]
      told = told or [i for i in own[-1] if not done[i].visual]
      cosine = x @ mean(told)
      many = int(self.initial * self.keep + 1e-6) - len(context)
      order = reference.best([cosine[i] for i in asked], many)
      return stay(done, [*context, *(asked[i] for i in order)])
    return done


@pytest.fixture(scope="module")
def found():
  """Logits and plans of all prompts as one padded batch."""
  slots = recipes.get("catp", keep=KEEP, from_layer=LAYER)
  shape = (len(NAMES), LENGTH)
  ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  kinds = np.full(shape, int(T), np.int32)
  for i, name in enumerate(NAMES):
    n = len(KINDS[name])
    ids[i, :n], mask[i, :n], kinds[i, :n] = PROMPTS[name], True, KINDS[name]
  cfg = config(depth=DEPTH)
  model, params = Decoder(cfg, slots), params_of(cfg)
  run = jax.jit(
    lambda *args: model.apply(
      {"params": params}, args[0], mask=args[1], kind=args[2]
    ),
    compiler_options=QUICK,
  )
  logits, out = run(ids, mask, kinds)
  return np.asarray(logits), out, kinds


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_those_of_a_slow_decoder(found, name):
  logits, out, kinds = found
  i, cfg = NAMES.index(name), config(depth=DEPTH)
  slow = reference.Slow(cfg, params_of(cfg))
  expected = slow.run(PROMPTS[name], KINDS[name], Catp(KEEP, LAYER))
  kept, source = [], np.arange(LENGTH)
  for plan in (plan for made in out["plans"] for plan in made):
    source = source[np.asarray(plan.anchor[i])[np.asarray(plan.valid[i])]]
    now = source[kinds[i, source] == V].tolist()
    if not kept or now != kept[-1]:
      kept.append(now)
  assert [k for k in kept if k] == expected.kept
  last = expected.tokens[-1].source
  np.testing.assert_allclose(
    logits[i, last], expected.logits[0], rtol=1e-4, atol=1e-4
  )
  visual = sum(kind == V for kind in KINDS[name])
  assert not visual or len(kept[-1]) == int(visual * KEEP + 1e-6)


def test_counts_of_its_card():
  """576 tokens, 77.8 % pruned: 351 after the first stage, 127 at the end."""
  made = recipes.get("catp", from_layer=6)
  budgets = [reduce.budget for reduce in made.reduce]
  acts = [
    {i: n for i, n in enumerate(b.counts(576, 32)) if n} for b in budgets
  ]
  assert acts == [{0: 351}, {6: 239}, {7: 127}]
  # One example: 127 tokens of it and 351 of the query are 239 an image.
  assert 2 * 239 == 127 + 351
  turned = [r.budget for r in recipes.get("catp", keep=0.5).reduce]
  assert [b.last for b in turned] == [0.5] * 3
  with pytest.raises(ValueError, match="from_layer=3: leaves no block"):
    Decoder(config(depth=4), recipes.get("catp", from_layer=3))
  with pytest.raises(ValueError, match="words=-1.0"):
    recipes.get("catp", words=-1.0)


def test_without_its_text_it_is_facility_location():
  """And groups have their limits."""
  x = unit(np.random.default_rng(0).normal(size=(8, 3)))
  worth = jnp.asarray((1 + x @ x.T) / 2)
  run = jax.jit(lambda w, **k: diversity.coverage(w, 4, **k).index)
  assert run(worth).tolist() == greedy(x, None, 4, 0.0)
  group = jnp.arange(8) % 2
  limited = run(worth, group=group, most=jnp.where(group == 0, 1, 3))
  assert sorted((limited % 2).tolist()) == [0, 1, 1, 1]
  bonus = jnp.zeros(8).at[5].set(9.0)
  assert run(worth, bonus=bonus)[0] == 5
