"""Native resolution and positions of three axes: slots, padding, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.case import compilations
from tests.decoder.models import config as plain_config
from tests.decoder.models import decoder, params_of, tokens
from tests.multimodal import native_models as models
from tests.multimodal.native_models import GRIDS, IMAGE, MORE, PROMPTS
from tokjax import budgets, recipes
from tokjax.attention import dense
from tokjax.models import (
  Rotary,
  VisionLanguage,
  native_patches,
  native_resolution,
  vlm_native,
)
from tokjax.models.decoder import Decoder
from tokjax.models.native_patches import Patches
from tokjax.models.native_resolution import NativeResolution
from tokjax.models.vlm_generation import prefill_whole
from tokjax.models.vlm_slots import vision_tower
from tokjax.signals import Derived
from tokjax.tokens import Kind

CLOSE = dict(rtol=1e-4, atol=1e-4)
HALF = budgets.Once(0.5)
DROP = recipes.get("pyramiddrop", stages=((1, 0.5),))
FASTV = recipes.get("fastv", layer=1)
SNAPKV = recipes.get("snapkv", window=2, budget=budgets.Count(6))
# Before, inside and behind the language model's blocks; all at once.
MAKES = {
  "fopru": lambda: recipes.get("fopru", budget=budgets.Count(6)),
  "pyramiddrop": lambda: DROP,
  "all": lambda: recipes.compose("divprune", FASTV, SNAPKV, keep=0.3),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_ragged_batch_equals_each_prompt_alone(name):
  made, images = models.generator(MAKES[name]()), models.images_of()
  together = models.answered(made, PROMPTS, images, MORE)
  for i, prompt in enumerate(PROMPTS):
    alone = models.answered(made, [prompt], [images[i]], MORE[:, i : i + 1])
    np.testing.assert_allclose(together[:, i], alone[:, 0], **CLOSE)


def run(model, params, *args, method=None, **options):
  """A call of a model as one program."""
  call = lambda params, args, options: model.apply(
    {"params": params}, *args, method=method, **options
  )
  return jax.jit(call)(params, args, options)


def places(grid) -> np.ndarray:
  """Time, row and column of the visual tokens of an image."""
  rows, columns = (side // 2 for side in grid)
  at = [[0, row, column] for row in range(rows) for column in range(columns)]
  return np.array(at)


def test_what_a_tower_removes_leaves_the_positions_of_the_others():
  """Equal to the language model on the tokens that remain, at their places."""
  slots = recipes.get("divprune", budget=HALF)
  made, few = models.generator(), models.generator(slots)
  grid, params = GRIDS[0][0], made.params
  packed, _ = made.pack([PROMPTS[0]], [models.images_of()[0]])
  seen, _ = run(made.model, params, packed.images, method="see")
  left, _ = run(few.model, params, packed.images, method="see")
  count = int(left.mask[0].sum())
  assert count == 6 and int(seen.mask[0].sum()) == 12
  inside = np.asarray(left.position[0, :count])
  whole = places(grid)
  rows = [int(np.flatnonzero((whole[:, 1:] == p).all(1))[0]) for p in inside]
  ids = [1, *[IMAGE] * count, 7, 9, 3]
  kind = [Kind.VISUAL if t == IMAGE else Kind.TEXT for t in ids]
  inputs = np.zeros((1, len(ids), 24), np.float32)
  inputs[0, 1 : count + 1] = np.asarray(seen.x)[0, rows]
  # The text goes on behind the longer side of 3 x 4 visual tokens.
  at = [[0, 0, 0], *(whole[rows] + 1).tolist(), *([n] * 3 for n in (5, 6, 7))]
  expected, _ = run(
    made.model.decoder, params["language"], jnp.array([ids]),
    kind=jnp.array([kind]), inputs=jnp.asarray(inputs),
    coordinates=jnp.array([at]),
  )  # fmt: skip
  found = few.prefill([PROMPTS[0]], [models.images_of()[0]])
  assert int(found.ahead[0]) == 8 - len(ids)
  np.testing.assert_allclose(found.logits[0], expected[0, -1], **CLOSE)


@pytest.mark.parametrize(
  "slots", [FASTV, DROP], ids=lambda slots: slots.name
)
def test_coordinates_stay_with_tokens_that_remain_in_the_language_model(slots):
  slots = dataclasses.replace(slots, collect=(Derived(fn=of_position),))
  made = models.generator(slots)
  packed, _ = made.pack([PROMPTS[2]], [models.images_of()[2]])
  _, out = run(made.model, made.params, packed)
  position = [np.asarray(a.values[0])[0] for a in out["signals"]]
  real = int(packed.length[0])
  first = [p + 0 for p in places(GRIDS[2][0])]
  second = [p + 3 for p in places(GRIDS[2][1])]
  text = [np.full(3, n) for n in (2, 8)]
  expected = np.array([*first, text[0], *second, text[1]])
  np.testing.assert_array_equal(position[0][:real, 1:], expected)
  (plan,) = out["plans"][1]
  anchor, left = np.asarray(plan.anchor[0]), position[1]
  kept = np.asarray(plan.valid[0]) & (anchor < real)
  assert 2 < kept.sum() < real
  np.testing.assert_array_equal(left[kept, 1:], expected[anchor[kept]])
  if slots.name == "pyramiddrop":
    np.testing.assert_array_equal(left[kept, 0], np.arange(kept.sum()))


def of_position(tokens):
  return tokens.position


def test_axes_that_agree_are_one_axis():
  """And only distances count, on each axis by itself."""
  plain = plain_config()
  axes = dataclasses.replace(plain, rotary=Rotary(sections=(1, 2, 1)))
  assert 2 * sum(axes.rotary.sections) == plain.features
  ids = jnp.asarray(tokens(2, 9))
  params = params_of(plain)
  expected, _ = run(decoder(), params, ids)
  at = jnp.broadcast_to(jnp.arange(9)[:, None], (2, 9, 3))
  of = lambda at: run(Decoder(axes), params, ids, coordinates=at)[0]
  np.testing.assert_allclose(of(at), expected, **CLOSE)
  moved = at * jnp.array([[[1, 2, 0]]])
  other = of(moved)
  assert np.abs(other - expected).max() > 1e-2
  shifted = of(moved + jnp.array([[[5, 0, 7]]]))
  np.testing.assert_allclose(shifted, other, **CLOSE)
  with pytest.raises(ValueError, match="has 2 axes.*have 3"):
    of(at[..., :2])
  with pytest.raises(ValueError, match="must sum to"):
    dataclasses.replace(plain, rotary=Rotary(sections=(1, 1, 1)))


def test_prompts_in_chunks_equal_whole_ones():
  images = models.images_of()
  whole = models.answered(models.generator(), PROMPTS, images, MORE)
  made = models.generator(chunk=8)
  parts = models.answered(made, PROMPTS, images, MORE)
  np.testing.assert_allclose(parts, whole, **CLOSE)
  packed, room = made.pack(PROMPTS, images)
  one = prefill_whole(made.model, made.params, packed, 2, 8, room)
  np.testing.assert_allclose(one.logits, whole[0], **CLOSE)


def test_rules_are_answered_for_merged_patches():
  """FoPru keeps those that receive most, here by the map of each patch."""
  slots = recipes.get("fopru", budget=budgets.Count(5))
  cfg, params = models.config(), models.generator().params["vision"]
  given = vlm_native.batch([models.image((6, 8))], cfg.vision, 1, 12)
  tower = vision_tower(cfg, slots)
  assert isinstance(tower, NativeResolution)
  _, out = run(tower, params, given)
  weight = run(tower, params, given, method=last_map)
  received = np.asarray(weight[0]).mean(axis=(0, 1)).reshape(12, 4).mean(1)
  best = np.sort(np.argsort(-received)[:5])
  np.testing.assert_array_equal(np.sort(out["plans"][0].anchor[0]), best)
  np.testing.assert_array_equal(
    np.sort(out["tokens"].position[0], axis=0),
    np.sort(places((6, 8))[best, 1:], axis=0),
  )


def last_map(tower: NativeResolution, patches: Patches):
  """The attention map of the last block, between patches."""
  place, real = native_patches.cells(48, patches.grid, 2)
  x = tower.patch(patches.pixels)
  tokens, known = native_resolution.tokens_of(x, place, real), None
  for block in tower.blocks:
    tokens, known = block(tokens, patches)
  return known.map


def test_windows_hold_every_patch_once_and_only_neighbours():
  made = native_patches.windows_of(np.array([6, 10]), 2, 4)
  assert made.shape == (6, 16)
  inside = made[made >= 0]
  assert sorted(inside.tolist()) == list(range(60))
  cell, real = native_patches.cells(64, jnp.array([[6, 10]]), 2)
  assert int(real.sum()) == 60
  for own in made:
    at = np.asarray(cell[0])[own[own >= 0]] // 4
    assert (at == at[0]).all()


def test_attention_to_whole_images_is_the_same_in_parts():
  """Rows of the map come in parts where there are many."""
  rng = np.random.default_rng(1)
  q, k, v = jnp.asarray(rng.normal(size=(3, 2, 2, 300, 4)), jnp.float32)
  mask = jnp.asarray(np.arange(300)[None] < np.array([[300], [17]]))
  found = jax.jit(native_resolution.whole)(q, k, v, mask)
  expected = dense.Dense()(q, k, v, mask=mask)
  np.testing.assert_allclose(found, expected, **CLOSE)


def test_one_compilation_for_each_bucket_of_sizes():
  made = models.generator()
  made.prefill(PROMPTS, models.images_of())
  other = (((4, 6),), ((4, 4),), ((6, 6),))
  prompts = [[1, IMAGE, 7], [2, IMAGE], [IMAGE, 8, 3]]
  before = compilations()
  jax.block_until_ready(made.prefill(prompts, models.images_of(other)).logits)
  assert compilations() == before


REFUSED = {
  "visionzip": "no class token",
  "fastervlm": r"tower 'vision'.*\['CLASS'\] tokens",
  "prumerge": "fills the tower 'ahead'",
  "avgpool_visual": "tower 'projector'.*images of different sizes",
  "folder": "tower 'vision'.*merged behind the last block",
  "gemfilter": "tower 'language'.*without again=",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_other_tokens_is_refused_when_built(name):
  with pytest.raises(ValueError, match=f"{REFUSED[name]}"):
    VisionLanguage(models.config(), recipes.get(name))


def test_bad_images_are_one_clear_error():
  made, good = models.generator(), models.image((4, 4))
  for given, message in (
    (np.zeros((8, 8, 3), np.float32), "got ndarray.*takes Patches"),
    (good._replace(grid=np.array([2, 8, 1])[:2] * [1, 3]), "both sides"),
    (good._replace(grid=np.array([1, 16])), "multiples of 2"),
    (good._replace(pixels=good.pixels.astype(int)), "dtype int64.*float"),
  ):
    with pytest.raises(ValueError, match=message):
      made.pack([[1, IMAGE]], [[given]])
  with pytest.raises(ValueError, match="2 placeholders.*for 1 images"):
    made.pack([[IMAGE, 3, IMAGE]], [[good]])
  with pytest.raises(ValueError, match="depends on the size of an image"):
    _ = made.image_tokens
  with pytest.raises(ValueError, match="positions of 1 axes"):
    text = dataclasses.replace(models.LANGUAGE, rotary=Rotary())
    models.config(language=text)
