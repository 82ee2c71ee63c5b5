"""VAR: attention goes from sinks to visual tokens that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of
from tests.multimodal import reference
from tests.multimodal.prompts import KINDS, MORE, PROMPTS
from tokjax import recipes
from tokjax.attention.redistribute import ToVisual
from tokjax.models import Generator
from tokjax.tokens import Kind

DEPTH, NAMES = 2, ("short", "few", "text")
VAR = ToVisual(0.6, 2.2, 0.5, 0.3, None, (1, 0))


def spread(attend, row, sink, visual):
  """One row of one head."""
  lift = lambda x, *shape: jnp.asarray(x).reshape(*shape, -1)
  run = jax.jit(attend.spread)
  found = run(
    lift(np.float32(row), 1, 1, 1, 1), lift(sink, 1, 1), lift(visual, 1, 1),
    jnp.ones((1, 1), bool),
  )  # fmt: skip
  return np.asarray(found).reshape(-1)


def test_a_row_of_its_card():
  row, sink = [0.5, 0.2, 0.2, 0.1], [True, True, False, False]
  visual = [False, True, True, False]
  found = spread(ToVisual(), row, sink, visual)
  np.testing.assert_allclose(found, [0.3, 0.12, 0.48, 0.1], rtol=1e-5)
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)
  for same, values, sinks in (
    (ToVisual(keep=1.0), row, sink),
    # Little attention to the image, much of it to a sink, or no visual sink.
    (ToVisual(), [0.75, 0.05, 0.1, 0.1], sink),
    (ToVisual(), [0.4, 0.3, 0.2, 0.1], sink),
    (ToVisual(), row, [True, False, False, False]),
  ):
    found = spread(same, values, sinks, visual)
    np.testing.assert_allclose(found, values, rtol=1e-6)


def test_sinks_have_a_massive_activation():
  x = np.ones((1, 3, 900), np.float32)
  x[0, 0, 7], x[0, 1, 8], x[0, 2, 7] = 60, 60, 15
  valid = jnp.ones((1, 3), bool)
  of = lambda attend: attend.sinks(jnp.asarray(x), valid)[0].tolist()
  assert of(ToVisual()) == [True, True, False]
  assert of(ToVisual(dims=(7, 9))) == [True, False, False]


class Slow(reference.Slow):
  """Rows of a head are changed one by one; its cache also holds two flags."""

  def __init__(self, config, params, attend):
    super().__init__(config, params)
    self.attend, self.changed = attend, 0

  def run(self, prompt, kinds, method, more=()):
    visual = [i for i, kind in enumerate(kinds) if kind == Kind.VISUAL]
    self.last = max(visual, default=-1)
    self.flags = [[] for _ in range(self.config.depth)]
    # Sinks of a whole prompt are known before its rows are changed: later ones
    # are of no consequence to an earlier row.
    return super().run(prompt, kinds, method, more)

  def attention_half(self, token, layer):
    rms = token.x / np.sqrt(np.mean(token.x**2) + 1e-6)
    prompt = token.source >= 0
    sink = prompt and np.abs(rms).max() > self.attend.threshold
    self.flags[layer].append((sink, token.visual))
    self.now = token
    return super().attention_half(token, layer)

  def weights(self, q, position, entries, layer):
    weight = super().weights(q, position, entries, layer)
    behind = self.now.source < 0 or self.now.source > self.last
    if layer < self.attend.spared[0] or not behind:
      return weight
    sink, visual = np.array(self.flags[layer], bool).T
    both = sink & visual
    if not both.any():
      return weight
    for row in weight:
      image = row[visual].sum()
      if row[both].sum() / (image + 1e-6 * visual.sum()) > self.attend.portion:
        continue
      if image < self.attend.least:
        continue
      self.changed += 1
      freed = (1 - self.attend.keep) * row[sink].sum()
      plain = visual & ~sink
      ratio = row[plain] / row[plain].sum()
      row[sink] *= self.attend.keep
      row[plain] += freed * ratio
    return weight


def test_prompts_and_steps_are_those_of_a_slow_decoder():
  cfg = config(depth=DEPTH)
  slots = recipes.get(
    "var", activation=VAR.threshold, portion=VAR.portion, least=VAR.least,
    spared=VAR.spared,
  )  # fmt: skip
  assert slots.attend == VAR
  made = Generator(
    decoder(slots, depth=DEPTH), params_of(cfg), capacity=16, decode=3,
    buckets=(16,),
  )  # fmt: skip
  going = made.prefill(
    [PROMPTS[n] for n in NAMES], [KINDS[n] for n in NAMES]
  )
  found = [np.asarray(going.logits)]
  for token in MORE[:2, : len(NAMES)]:
    going = made.step(going, token.astype(np.int32))
    found.append(np.asarray(going.logits))
  changed = []
  for i, name in enumerate(NAMES):
    slow = Slow(cfg, params_of(cfg), VAR)
    expected = slow.run(
      PROMPTS[name], KINDS[name], reference.Plain(), MORE[:2, i]
    )
    for ours, theirs in zip(found, expected.logits, strict=True):
      np.testing.assert_allclose(ours[i], theirs, rtol=1e-4, atol=1e-4)
    changed.append(slow.changed)
  assert changed[0] > 5 and changed[2] == 0, changed


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(portion=1.5), "portion=1.5"),
    (dict(activation=0.0), "threshold=0.0"),
    (dict(dims=()), r"dims=\(\)"),
  ],
)
def test_options_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    recipes.get("var", **options)


def test_dimensions_are_those_of_the_model():
  model = decoder(recipes.get("var", dims=(1415, 2533)), depth=DEPTH)
  ids = jnp.zeros((1, 2), jnp.int32)
  with pytest.raises(ValueError, match="dims=.1415, 2533.*have 16 dimensions"):
    jax.eval_shape(model.init, jax.random.key(0), ids)
