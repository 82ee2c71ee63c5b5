"""Every visual recipe in small models shaped as published ones.

The contract holds recipes to the laws in models shaped as LLaVA. Here each is
built into others: patches that are mixed or merged, tiles, images of any size
with positions of three axes, two encoders. What is refused is refused by name.
What is taken leaves fewer tokens, and an example does not feel the others of
its batch nor what stands in its padding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK, options_of
from tests.decoder.models import config as language
from tests.multimodal import native_models, vlm_models
from tests.multimodal.vlm_models import IMAGE
from tokjax import recipes
from tokjax.models import VisionLanguage, VisionLanguageGenerator, ViTConfig
from tokjax.models.any_resolution import Crops
from tokjax.models.projector import ProjectorConfig
from tokjax.recipes.registry import registered
from tokjax.slots import Slots

SIDE, LENGTH, KEEP = 8, 128, 0.3
# 4 x 4 patches.
CLIP = ViTConfig(
  image_size=SIDE, patch_size=2, width=8, depth=3, heads=2, mlp_dim=8,
  num_classes=None, pool="none",
)  # fmt: skip
SIGLIP = dataclasses.replace(CLIP, class_token=False)
PROMPTS = ([1, IMAGE, 7, 9, 3, 4], [2, IMAGE, 5, IMAGE, 8])
TEXT = [3, 5, 6]
NAMES = tuple(r.name for r in registered("vlm") if r.training != "learned")
# Of towers of three blocks.
OPTIONS = {"vtc_cls": {"blocks": 2}}
ROOM = 8
# Some that each model takes in its towers.
TOWERS = {
  "onevision": ("divprune", "avgpool_visual", "hiprune"),
  "internvl": ("divprune", "fastervlm", "holov"),
  "openvla": ("divprune", "fastervlm", "prumerge", "turbo"),
  "qwen": ("divprune", "gprune"),
}
# In the language model those are run that keep and renumber positions, merge
# and ask for keys; the decoder is else the one of the contract.
RUN = {
  "onevision": ("fastv",),
  "internvl": ("catp",),
  "openvla": ("vla_pruner",),
  "qwen": ("fastv", "sparsevlm"),
}


def crops(many):
  """An image of so many crops, the first of which shows all of it."""
  rng = np.random.default_rng(many)
  pixels = rng.normal(size=(many, SIDE, SIDE, 3)).astype(np.float32)
  return Crops(pixels, (SIDE * (many - 1), SIDE))


def plain(channels):
  rng = np.random.default_rng(channels)
  return lambda: rng.normal(size=(SIDE, SIDE, channels)).astype(np.float32)


# How models differ from LLaVA's, and images of the prompts.
HOSTS = {
  "onevision": (
    dict(
      vision=SIGLIP, ahead=False, most_crops=4,
      pinpoints=((2 * SIDE, SIDE), (SIDE, 2 * SIDE)),
    ),
    lambda: [[crops(3)], [crops(1), crops(1)]],
  ),
  "internvl": (
    dict(vision=CLIP, ahead=False, merge=2, tiled=True),
    lambda: [[crops(5)], [crops(2), crops(3)]],
  ),
  "openvla": (
    dict(vision=dataclasses.replace(CLIP, registers=2), fused=SIGLIP),
    lambda: [[plain(6)()], [plain(6)(), plain(6)()]],
  ),
  "qwen": (
    {}, lambda: native_models.images_of((((8, 6),), ((4, 4), (6, 4))))
  ),
}  # fmt: skip


def config_of(host, depth):
  """Of a model with so many blocks in its language model."""
  if host == "qwen":
    text = dataclasses.replace(native_models.LANGUAGE, depth=depth)
    return native_models.config(language=text)
  text = language(depth=depth, width=8, heads=2, kv_heads=1, mlp_dim=8,
                  tied=False, length=256)  # fmt: skip
  return vlm_models.config(
    **HOSTS[host][0], language=text, projector=ProjectorConfig(text.width)
  )


@functools.cache
def generator(host, slots, depth):
  model = VisionLanguage(config_of(host, depth), slots)
  return VisionLanguageGenerator(
    model, vlm_models.params_of(model.config), capacity=LENGTH, decode=1,
    buckets=(LENGTH,), image_buckets=(ROOM,), size_buckets=(12,),
  )  # fmt: skip


def packed(made, prompts, images):
  """Prompts whose padding holds other ids."""
  found, _ = made.pack(prompts, images)
  tokens = jnp.where(found.valid, found.tokens, 11)
  return dataclasses.replace(found, tokens=tokens)


def taken(host, towers):
  """Recipes that the model takes, with a generator; others say their name.

  Args:
    host: the model.
    towers: of recipes, only what fills towers; False: what reduces in the
      language model.
  """
  for name in NAMES:
    options = {**options_of(name), **OPTIONS.get(name, {})}
    slots = recipes.get(name, keep=KEEP, **options)
    if towers and not slots.towers or not (towers or slots.reduce):
      continue
    if towers:
      slots = Slots(towers=slots.towers, name=name)
    try:
      yield name, generator(host, slots, 1 if towers else 4)
    except ValueError as error:
      assert name in str(error), error


def look(made):
  """Visual tokens of images, zeros where they are padding, and how many."""
  model = made.model

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(params, images):
    see = lambda x: model.apply(x, images, jax.random.key(0), method="see")
    tokens, _ = see({"params": params})
    real = jnp.ones(tokens.x.shape[:2], bool)
    real = real if tokens.mask is None else tokens.mask
    return jnp.where(real[..., None], tokens.x, 0.0), real.sum(axis=1)

  return lambda images: jax.device_get(run(made.params, images))


@pytest.mark.parametrize("host", HOSTS)
def test_towers_leave_fewer_tokens_of_each_image_alone(host):
  given = [x for of_one in HOSTS[host][1]() for x in of_one]
  seen = []
  bare = generator(host, vlm_models.PLAIN, 1)
  of = lambda images: bare.pack([[IMAGE] * len(images)], [images])[0].images
  both, other = of(given), of(given[::-1])
  _, every = look(bare)(both)
  for name, made in taken(host, True):
    seen.append(name)
    run = look(made)
    x, many = run(both)
    assert np.isfinite(x).all(), name
    back = any(
      r.back for _, own in made.model.slots.towers for r in own.reduce
    )
    # The smallest images may be too small to lose any.
    assert back or many.sum() < every.sum(), name
    assert (many <= every).all(), name
    if made.model.slots.needs_key:
      continue
    # In another order, next to others.
    again, left = run(other)
    parts = [len(getattr(image, "pixels", [0])) for image in given]
    order = moved(parts) if host in ("onevision", "internvl") else [2, 1, 0]
    assert left[order].tolist() == many[: len(order)].tolist(), name
    np.testing.assert_allclose(
      again[order], x[: len(order)], rtol=1e-4, atol=1e-4, err_msg=name
    )
  assert set(TOWERS[host]) <= set(seen), seen


def moved(parts):
  """Where crops of images are that come in the reverse order."""
  ends = np.cumsum(parts[::-1])[::-1]
  return [end - many + j for end, many in zip(ends, parts, strict=True)
          for j in range(many)]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_language_models_leave_fewer_tokens_of_each_prompt_alone(host):
  images, seen = HOSTS[host][1](), []
  for name, made in taken(host, False):
    seen.append(name)
    if name not in RUN[host]:
      continue
    run = program(made)
    together = packed(made, PROMPTS, images)
    logits, remains = run(together)
    whole, _ = generator(host, vlm_models.PLAIN, 1).pack(PROMPTS, images)
    assert (remains < np.asarray(whole.length)).all(), name
    assert np.isfinite(logits).all(), name
    for i, place in ((0, 1), (1, 0)):
      prompts, own = [TEXT, TEXT], [[], []]
      prompts[place], own[place] = PROMPTS[i], images[i]
      alone, left = run(packed(made, prompts, own))
      np.testing.assert_allclose(
        alone[place], logits[i], rtol=1e-4, atol=1e-4, err_msg=name
      )
      assert left[place] == remains[i], name
  assert set(RUN[host]) <= set(seen), seen


def program(made):
  """Logits behind each prompt, and how many of its tokens remain."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(params, prompts):
    key = jax.random.key(0)
    logits, out = made.model.apply({"params": params}, prompts, key=key)
    last = jax.vmap(lambda x, n: x[n - 1])(logits, prompts.length)
    return last, out["remains"].sum(axis=1)

  return lambda prompts: jax.device_get(run(made.params, prompts))
