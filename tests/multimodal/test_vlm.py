"""Vision-language models: ragged prompts, towers, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.case import compilations
from tests.multimodal import vlm_models
from tests.multimodal.vlm_models import DECODE, IMAGE, PROMPTS
from tokjax import budgets, recipes
from tokjax.models import ViT, any_resolution
from tokjax.models.any_resolution import Crops
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_slots import stages_of
from tokjax.models.vlm import language_slots, tokens_per_image
from tokjax.slots import Slots
from tokjax.tokens import Kind

CLOSE = dict(rtol=1e-4, atol=1e-4)
MORE = np.random.default_rng(6).integers(1, 38, (DECODE, 4)).astype(np.int32)
SNAPKV = recipes.get("snapkv", window=2)
ADAPTIVE = recipes.get("ats", keep=0.5).within("vision")
# The plain model is compared with the reference in tests/interop/test_llava.py.
MAKES = {
  "adaptive": lambda: ADAPTIVE,
  "all": lambda: recipes.compose("visionzip", "fastv", SNAPKV, keep=0.2),
}


def answered(made, prompts, images, more):
  """Logits behind the prompt and behind each token that follows."""
  going = made.prefill(prompts, images)
  found = [np.asarray(going.logits)]
  for token in more:
    going = made.step(going, token)
    found.append(np.asarray(going.logits))
  return np.stack(found)


@pytest.mark.parametrize("name", MAKES)
def test_a_ragged_batch_equals_each_prompt_alone(name):
  made = vlm_models.generator(MAKES[name]())
  images = vlm_models.images_of()
  batch = answered(made, PROMPTS, images, MORE)
  one = slice(2, 3)
  alone = answered(made, PROMPTS[one], images[one], MORE[:, one])
  np.testing.assert_allclose(batch[:, one], alone, **CLOSE)
  # The other prompts, in another order and with another one among them.
  order = [3, 1, 0, 2]
  prompts = [PROMPTS[i] for i in order[:3]] + [[IMAGE, 6]]
  given = [images[i] for i in order[:3]] + [images[2][:1]]
  other = answered(made, prompts, given, MORE[:, order])
  np.testing.assert_allclose(batch[:, order[:3]], other[:, :3], **CLOSE)


def test_visual_tokens_stand_where_their_placeholders_are():
  """Against the decoder, fed with what the towers before it make."""
  made = vlm_models.generator()
  model, params = made.model, made.params
  images = vlm_models.images_of()
  whole = [image for own in images for image in own]
  see = jax.jit(lambda x: model.apply({"params": params}, x, method="see")[0].x)
  features = list(np.asarray(see(np.stack(whole))))
  table = np.asarray(params["language"]["embed"]["embedding"])
  decoder = jax.jit(
    lambda x, kind: model.decoder.apply(
      {"params": params["language"]}, jnp.zeros(kind.shape, jnp.int32),
      kind=kind, inputs=x,
    )[0]
  )  # fmt: skip
  batch = np.asarray(made.prefill(PROMPTS, images).logits)
  for i in (1, 2):
    rows = [
      features.pop(0) if t == IMAGE else table[t][None] for t in PROMPTS[i]
    ] if i else []
    if i == 1:
      features.pop(0)  # That of prompt 0.
    x = np.concatenate(rows)[None]
    kind = jnp.full(x.shape[:2], Kind.VISUAL)
    np.testing.assert_allclose(batch[i], decoder(x, kind)[0, -1], **CLOSE)


def test_fewer_visual_tokens_make_shorter_prompts_and_smaller_caches():
  plain, few = vlm_models.config(), recipes.get("visionzip", keep=0.34)
  assert tokens_per_image(plain, Slots()) == 36
  assert tokens_per_image(plain, few) == 13
  assert tokens_per_image(plain, ADAPTIVE) == 18
  images = vlm_models.images_of()
  packed, room = vlm_models.generator(few).pack(PROMPTS, images)
  assert packed.length.tolist() == [4 + 13, 2, 2 + 26, 1 + 13]
  assert dict(room) == {Kind.TEXT: 32, Kind.VISUAL: 26}
  sizes = []
  for slots in (Slots(), few):
    made = vlm_models.generator(slots)
    sizes.append(made.bytes(made.prefill(PROMPTS, images)))
  assert sizes[1].physical * 3 < sizes[0].physical
  assert sizes[1].logical[2] * 2 < sizes[0].logical[2]


def test_one_compilation_for_each_bucket_of_text_and_images():
  made = vlm_models.generator()
  images = vlm_models.images_of()
  jax.block_until_ready(made.prefill(PROMPTS, images))
  before = compilations()
  other = [[IMAGE, 5, IMAGE, 8], [3], [9, 9, 9, IMAGE], [4, 4]]
  jax.block_until_ready(made.prefill(other, vlm_models.images_of(other)))
  assert compilations() == before


def test_what_is_compiled_for_follows_from_buckets_alone():
  """Also where text has what images leave: here a bucket holds more."""
  points = ((12, 24), (24, 12), (24, 24))
  made = dataclasses.replace(
    vlm_models.generator(pinpoints=points), buckets=(256,), capacity=256
  )

  def static(texts, sizes):
    prompts = [[*range(1, n), IMAGE, 2] for n in texts]
    images = []
    for high, wide in sizes:
      best = any_resolution.best_size((high, wide), points)
      crops = 1 + best[0] * best[1] // 144
      pixels = np.zeros((crops, 12, 12, 3), np.float32)
      images.append([any_resolution.Crops(pixels, (high, wide))])
    packed, room = made.pack(prompts, images)
    shapes = [x.shape for x in jax.tree.leaves(packed)]
    return room, shapes, packed.length.tolist()

  room, shapes, length = static((3, 9), ((24, 24), (24, 20)))
  assert dict(room)[Kind.TEXT] < 256
  for texts, sizes in (
    ((7, 2), ((24, 23), (21, 24))), ((12, 12), ((22, 24), (24, 24)))
  ):  # fmt: skip
    again = static(texts, sizes)
    assert again[:2] == (room, shapes) and again[2] != length


def test_text_alone_is_what_the_language_model_says():
  made = vlm_models.generator()
  text = [[1, 2, 3], [4, 5, 6, 7, 8]]
  np.testing.assert_allclose(
    made.prefill(text).logits, made.language.prefill(text).logits, **CLOSE
  )
  assert made.generate(text) == made.language.generate(text)


def test_towers_share_what_is_kept():
  slots = recipes.compose("visionzip", "fastv", SNAPKV, keep=0.25)
  (zipped,) = slots.tower("vision").reduce
  (fast,) = slots.reduce
  assert zipped.budget.count(576, 22, 23) == 288
  assert fast.budget.count(289, 2, 32) == 144
  assert slots.cache.evict.budget.with_keep(0.25) == slots.cache.evict.budget
  assert slots.name == "visionzip+fastv+snapkv"
  assert zipped.recipe == "visionzip" and fast.recipe == "fastv"
  both = recipes.compose(recipes.get("tome").within("vision"), "visionzip")
  names = [r.recipe for r in both.tower("vision").reduce]
  assert names == ["tome", "visionzip"]
  assert both.reductions == 2


def test_reductions_of_all_towers_act_one_after_the_other():
  slots = recipes.compose(
    recipes.get("tome", keep=0.5).within("vision"), "visionzip",
    recipes.get("random_visual", budget=budgets.Once(0.5)), "fastv",
    keep=0.1,
  )  # fmt: skip
  count = tokens_per_image(vlm_models.config(), slots)
  made = vlm_models.generator(slots)
  images = vlm_models.images_of()
  going = made.prefill(PROMPTS, images, key=jax.random.key(0))
  held = [int(s.store.length[2, 0]) for s in going.states]
  assert held[0] == 2 * count + 2 and held[2] < held[0]
  again = made.prefill(PROMPTS, images, key=jax.random.key(0))
  np.testing.assert_array_equal(going.logits, again.logits)
  with pytest.raises(ValueError, match="(?s)random_visual.*key="):
    made.prefill(PROMPTS, images)
  stages = stages_of(
    slots.outside_towers, made.model.config.language, 32,
    ((Kind.VISUAL, 2 * count), (Kind.TEXT, 2)),
  )  # fmt: skip
  assert sum(map(len, stages)) == 1


WRONG = {
  "unknown": (
    lambda: Slots().within("audio"), r"tower 'audio'.*vision, ahead, projector",
  ),
  "language": (
    lambda: recipes.get("tome"), r"tower 'language'.*'tome'.*within",
  ),
  "vision": (
    lambda: recipes.get("fastv").within("vision"),
    r"tower 'vision'.*'fastv'.*VISUAL.*PATCH",
  ),
  "cache": (
    lambda: recipes.get("snapkv").within("vision"),
    r"tower 'vision'.*'snapkv'.*'cache'.*decoders",
  ),
  "attention": (
    lambda: recipes.get("visionzip").tower("vision").within("projector"),
    r"tower 'projector'.*'visionzip'.*'pass_class'",
  ),
  "question": (
    lambda: recipes.get("fastervlm").tower("vision").within("projector"),
    r"tower 'projector'.*'fastervlm'.*Rows.*vision tower",
  ),
  "around": (
    lambda: recipes.get("tomesd").within("projector"),
    r"tower 'projector'.*'tomesd'.*'attention'",
  ),
  "losses": (
    lambda: Slots(losses=(print,)).within("vision"), r"tower 'vision'.*losses",
  ),
  "grid": (
    lambda: recipes.compose("fastervlm", "avgpool_visual", keep=0.5),
    r"tower 'projector'.*avgpool_visual.*grid",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_tower_cannot_carry_out_is_refused_when_built(name):
  make, message = WRONG[name]
  with pytest.raises(ValueError, match=f"(?s){message}"):
    vlm_models.model(make())


def test_a_recipe_of_the_class_token_is_refused_without_one():
  vision = dataclasses.replace(vlm_models.VISION, class_token=False)
  asking = ("visionzip", "fastervlm", "vispruner", "scope", "turbo", "folder")
  for name in (*asking, "flowcut", "holov", "visiondrop"):
    with pytest.raises(ValueError, match=f"{name}.*(class|CLASS)") as found:
      vlm_models.model(recipes.get(name), vision=vision)
    assert "tower 'vision'" in str(found.value)
  for name in ("todre", "prumerge", "prumerge_plus"):
    with pytest.raises(ValueError, match=f"(?s)'ahead'.*'{name}'.*CLASS"):
      vlm_models.model(recipes.get(name), vision=vision)
  plain = vlm_models.model(vision=vision).config
  assert tokens_per_image(plain, Slots()) == 36
  assert tokens_per_image(plain, recipes.get("gprune")) == 18


@pytest.mark.parametrize("name", recipes.names("vlm"))
def test_every_recipe_leaves_fewer_tokens_somewhere(name):
  blocks = {"vtc_cls": {"blocks": 2}}.get(name, {})
  slots = recipes.get(name, keep=0.5, **blocks)
  config = vlm_models.config()
  back = any(r.back for _, own in slots.towers for r in own.reduce)
  if slots.towers:
    count = tokens_per_image(config, slots)
    assert count == 36 if back else count < 36
  if slots.reduce:
    text = dataclasses.replace(config.language, depth=4)
    room = ((Kind.VISUAL, 36), (Kind.TEXT, 9))
    stages = stages_of(language_slots(config, slots), text, 45, room)
    assert any(s.keep < s.arriving for block in stages for s in block)


def test_a_tower_is_refused_by_models_without_towers():
  cfg = vlm_models.config()
  for build in (ViT, Decoder):
    part = cfg.vision if build is ViT else cfg.language
    with pytest.raises(ValueError, match="'visionzip'.*'towers'.*vision-lang"):
      build(part, recipes.get("visionzip"))
  for towers in ((("a", Slots()), ("a", Slots())), (("a", 1),)):
    with pytest.raises(ValueError, match="towers"):
      Slots(towers=towers)


def test_bad_input_is_one_clear_error():
  made = vlm_models.generator()
  images = vlm_models.images_of()
  for prompts, given, message in (
    (PROMPTS, images[:3], "3 entries for 4 prompts"),
    (PROMPTS, [[], *images[1:]], "prompt 0 has 1 placeholders.*for 0 images"),
    ([[1], *PROMPTS[1:]], images, "prompt 0 has 0 placeholders.*for 1 images"),
    ([[IMAGE]], [[np.zeros((1, 1, 3), np.float32)]], r"shape \(1, 1, 3\)"),
    ([[IMAGE]], [[Crops(images[0][0][None], (9, 9))]], "takes arrays"),
    ([[IMAGE]], [[np.zeros((12, 12, 3), np.uint8)]], "dtype uint8"),
    ([[IMAGE] * 4], [images[2] * 2], "has 144 tokens, the capacity is 128"),
    ([[]], [[]], "prompt 0 is empty"),
    ([[1, 40]], [[]], "token id 40"),
  ):
    with pytest.raises(ValueError, match=message):
      made.prefill(prompts, given)
  with pytest.raises(ValueError, match="image_token=99"):
    vlm_models.config(image_token=99)
  with pytest.raises(ValueError, match="image_buckets"):
    made.__class__(made.model, made.params, 8, 1, image_buckets=())


def test_text_has_no_more_room_than_images_leave():
  coarse = vlm_models.generator()
  made = dataclasses.replace(coarse, image_buckets=(1, 2, 4))
  prompts = [[1, IMAGE, 7], [1, IMAGE, 7, 9, 3, 5]]
  packed, room = made.pack(prompts, vlm_models.images_of(prompts))
  # Padded to 128; 5 words would be given 32 places, and 36 are patches.
  assert packed.tokens.shape == (2, 128) and dict(room)[Kind.TEXT] == 32
  short = dataclasses.replace(made, buckets=(41,))
  packed, room = short.pack(prompts, vlm_models.images_of(prompts))
  assert packed.tokens.shape == (2, 41) and dict(room)[Kind.TEXT] == 5
  both = [*prompts, [2, 5]]
  _, room = short.pack(both, vlm_models.images_of(both))
  assert dict(room)[Kind.TEXT] == 41, "a text without images fills its prompt"
  short = dataclasses.replace(coarse, buckets=(41,))
  _, room = short.pack(prompts, vlm_models.images_of(prompts))
  assert dict(room)[Kind.TEXT] == 41, "fewer images than the smallest bucket"
