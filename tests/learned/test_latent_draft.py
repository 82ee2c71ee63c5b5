"""FLASH's draft against slow loops, and as what makes text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.case import draw_params
from tests.multimodal import vlm_models
from tokjax import losses, recipes
from tokjax.learned import LatentDraft
from tokjax.models import Speculative, VisionLanguageGenerator
from tokjax.models.decoder import DraftedLogits
from tokjax.models.rotary import Rotary
from tokjax.models.vlm import VisionLanguage
from tokjax.tokens import Kind

D, HEADS, GROUPS, AHEAD, LATENTS = 8, 2, 3, 2, 2
T, V = int(Kind.TEXT), int(Kind.VISUAL)
# Text in front and behind, none in front, no image, and padding.
KINDS = np.array([
  [T, T, V, V, V, T, T, T], [V, V, T, T, T, T, T, T], [T] * 8
])  # fmt: skip
COUNT = np.array([8, 6, 4])
RNG = np.random.default_rng(0)
FEATURES, EMBEDDED = RNG.normal(size=(2, 3, 8, D)).astype(np.float32)
VALID = np.arange(8)[None] < COUNT[:, None]
INPUTS = tuple(map(jnp.asarray, (FEATURES, EMBEDDED, KINDS, VALID)))


@functools.cache
def made(latents=LATENTS):
  draft = LatentDraft(
    latents, AHEAD, GROUPS, width=D, heads=HEADS, rotary=Rotary()
  )
  init = lambda: draft.init(jax.random.key(0), *INPUTS)
  return draft, draw_params(jax.eval_shape(init)["params"])


@functools.cache
def drafted(latents=LATENTS):
  draft, params = made(latents)
  run = jax.jit(lambda *a: draft.apply({"params": params}, *a))
  return run(*INPUTS)


def turned(x, place):
  """Rotated, one head's features."""
  half = len(x) // 2
  angle = place * 10_000.0 ** (-np.arange(half) / half)
  cos, sin = np.cos(angle), np.sin(angle)
  a, b = x[:half], x[half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def slow(params, i, latents):
  """Guesses behind each text token of an example, and the text features."""
  dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
  real = range(COUNT[i])
  image = [FEATURES[i, n] for n in real if KINDS[i, n] == V]
  text = [n for n in real if KINDS[i, n] == T]
  first = min([n for n in real if KINDS[i, n] == V], default=0)
  rows, whose = [], []
  for j, n in enumerate(text):
    if n < first:
      rows.append(FEATURES[i, n])
      whose.append(j)
  if image and latents is None:
    rows += image
  elif image:
    for latent in params["latents"]:
      weight = np.exp([latent @ x for x in image])
      rows.append(weight @ np.array(image) / weight.sum())
  whose += [None] * (len(rows) - len(whose))
  for j, n in enumerate(text):
    if n >= first:
      after = EMBEDDED[i, text[j + 1]] if j + 1 < len(text) else None
      if after is None:  # Is nothing to learn from.
        after = EMBEDDED[i, text[0]] * np.nan
      rows.append(dense("join", np.concatenate([after, FEATURES[i, n]])))
      whose.append(j)
  size, out = D // HEADS, {}
  for place, (x, j) in enumerate(zip(rows, whose, strict=True)):
    q = dense("query", x).reshape(HEADS, size)
    y = np.zeros((HEADS, size))
    for h in range(HEADS):
      for g in range(GROUPS):
        part = lambda name, z, g=g: dense(name, z).reshape(GROUPS, size)[g]
        keys = [turned(part("key", z), p) for p, z in enumerate(rows)]
        logits = np.array([
          turned(q[h], place) @ k for k in keys[: place + 1]
        ]) * size**-0.5  # fmt: skip
        weight = np.exp(logits - logits.max())
        weight /= weight.sum()
        values = np.array([part("value", z) for z in rows[: place + 1]])
        y[h] += weight @ values
    y = dense("wide", dense("out", y.reshape(-1)))
    y = y / (1 + np.exp(-y))
    if j is not None:
      out[j] = dense("next", y).reshape(AHEAD, D)
  return out, [FEATURES[i, n] for n in text], first


@pytest.mark.parametrize("latents", [LATENTS, None])
def test_guesses_are_those_of_slow_loops(latents):
  params, found = made(latents)[1], drafted(latents)
  for i in range(3):
    guess, true, first = slow(params, i, latents)
    for j, rows in guess.items():
      if not np.isnan(rows).any():
        np.testing.assert_allclose(
          found.features[i, j], rows, rtol=1e-4, atol=1e-5
        )
      for k in range(AHEAD):
        there = j + 1 + k < len(true) and (first == 0 or j >= first)
        assert found.weight[i, j, k] == there
        if there:
          np.testing.assert_array_equal(found.target[i, j, k], true[j + 1 + k])


def test_latents_of_zeros_are_the_mean_and_know_no_order():
  draft, params = made()
  params = {**params, "latents": jnp.zeros_like(params["latents"])}
  visual = KINDS == V
  pool = lambda x, mask, params=params: draft.apply(
    {"params": params}, jnp.asarray(x), jnp.asarray(mask), method="pooled"
  )
  z, there = pool(FEATURES, visual)
  np.testing.assert_allclose(
    z[0], np.tile(FEATURES[0, 2:5].mean(axis=0), (2, 1)), rtol=1e-5
  )
  assert there.tolist() == [[True] * 2, [True] * 2, [False] * 2]
  order = [0, 1, 4, 2, 3, 5, 6, 7]
  own = made()[1]
  np.testing.assert_allclose(
    pool(FEATURES, visual, own)[0][0],
    pool(FEATURES[:, order], visual, own)[0][0], rtol=1e-5,
  )  # fmt: skip


def test_reading_on_is_reading_at_once():
  """A prompt, then one row, two rows and none: what the whole text says."""
  draft, params = made()

  def apply(method, *args):
    args = jax.tree.map(
      lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, args
    )
    return draft.apply({"params": params}, *args, method=method)

  cut = COUNT - 3
  short = np.arange(8)[None] < cut[:, None]
  at = lambda x, i: x[np.arange(3), i]
  # Behind the prompts all is text.
  out, seen = apply(
    "begin", FEATURES, EMBEDDED, at(EMBEDDED, cut), KINDS, short, (6, 4)
  )
  text = (short & (KINDS == T)).sum(axis=1)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  close(out, at(drafted().features, text - 1))
  rows = np.stack([cut, cut + 1], axis=1)
  take = lambda x, i: np.take_along_axis(x, i[..., None], axis=1)
  out, seen = apply(
    "more", seen, take(FEATURES, rows), take(EMBEDDED, rows + 1),
    np.array([2, 1, 0]), 4,
  )  # fmt: skip
  close(out[0], drafted().features[0, text[0] + 1])
  close(out[1], drafted().features[1, text[1]])
  out, _ = apply(
    "more", seen, take(FEATURES, rows[:, 1:]), take(EMBEDDED, rows[:, 1:] + 1),
    np.array([0, 1, 0]), 4,
  )  # fmt: skip
  close(out[1], drafted().features[1, text[1] + 1])


def test_the_loss_by_hand():
  found = drafted()
  rng = np.random.default_rng(1)
  logits, target = rng.normal(size=(2, *found.weight.shape, 5))
  said = DraftedLogits(found, jnp.asarray(logits), jnp.asarray(target))
  view = losses.View(*[None] * 6, {"draft": said})
  total, count = 0.0, 0
  for i, j, k in np.argwhere(np.asarray(found.weight)):
    gap = np.abs(found.features[i, j, k] - found.target[i, j, k])
    near = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    p = np.exp(target[i, j, k]) / np.exp(target[i, j, k]).sum()
    q = np.exp(logits[i, j, k]) / np.exp(logits[i, j, k]).sum()
    total += near - 0.1 * (p * np.log(q)).sum()
    count += 1
  assert 5 < count < found.weight.size
  np.testing.assert_allclose(losses.Drafting()(view), total / count, rtol=1e-5)


def test_it_guesses_for_a_vision_language_model():
  """The text is the greedy one; prompts with none to two images."""
  config = vlm_models.config()
  plain = vlm_models.generator()
  slots = recipes.get("flash", latents=2, ahead=2, groups=2)
  model = VisionLanguage(config, slots)
  draft = slots.draft.clone(
    width=config.language.width, heads=4, rotary=Rotary()
  )
  features = jnp.zeros((1, 2, config.language.width))
  shapes = jax.eval_shape(
    lambda: draft.init(
      jax.random.key(0), features, features, jnp.ones((1, 2), jnp.int32),
      jnp.ones((1, 2), bool),
    )
  )  # fmt: skip
  params = {
    **plain.params,
    "language": {
      **plain.params["language"], "draft": draw_params(shapes["params"])
    },
  }  # fmt: skip
  made = VisionLanguageGenerator(
    model, params, plain.capacity, plain.decode, plain.buckets,
    plain.image_buckets,
  )  # fmt: skip
  images = vlm_models.images_of()
  texts, said = Speculative(made).generate(vlm_models.PROMPTS, images)
  assert texts == plain.generate(vlm_models.PROMPTS, images)
  assert said.rounds.min() >= 1
  with pytest.raises(ValueError, match="'flash' fills 'draft'"):
    made.generate(vlm_models.PROMPTS, images)
