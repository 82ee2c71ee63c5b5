"""OpenVLA: two fused encoders, action tokens; logits equal the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from PIL import Image

from experiments import generate, pictures
from experiments.sweeps.language_models import Pretrained
from tests.interop.language_references import torch
from tests.interop.prismatic_reference import Prismatic, actions_of
from tests.interop.references import randomise
from tests.interop.vlm_parity import BOUND, answers, photos
from tokjax import interop, recipes
from tokjax.interop import files, prismatic_images
from tokjax.models import VisionLanguageGenerator

PAD, STEPS, SIDE = 48, 7, 14
DINO = dict(
  embed_dim=24, depth=3, num_heads=2, mlp_ratio=2.0, patch_size=4,
  init_values=1e-5, reg_tokens=2, no_embed_class=True,
)  # fmt: skip
SIGLIP = dict(
  embed_dim=20, depth=2, num_heads=4, mlp_ratio=1.7, patch_size=4,
  class_token=False,
)  # fmt: skip
TEXT = dict(
  vocab_size=56, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
)  # fmt: skip
STATISTICS = {
  "bridge": {
    "action": {
      "q01": [-0.5, 0.0, -2.0, 0.1, 0.2, -1.0, 0.0],
      "q99": [0.5, 1.0, 3.0, 0.4, 0.2, 1.5, 1.0],
      "mask": [True] * 6 + [False],
    }
  },
  "two": {"action": {"q01": [0.0, -1.0], "q99": [4.0, 1.0]}},
}
OPENVLA = dict(
  architectures=["OpenVLAForActionPrediction"], model_type="openvla",
  timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m",
                  "vit_so400m_patch14_siglip_224"],
  timm_model_args=[DINO, SIGLIP], timm_override_act_layers=[None, None],
  image_sizes=[SIDE, SIDE], use_fused_vision_backbone=True,
  text_config={"model_type": "llama", **TEXT}, pad_token_id=PAD,
  pad_to_multiple_of=8, n_action_bins=9, norm_stats=STATISTICS,
)  # fmt: skip
IMAGES = dict(
  image_processor_type="PrismaticImageProcessor",
  image_resize_strategy="resize-naive", use_fused_vision_backbone=True,
  input_sizes=[[3, SIDE, SIDE]] * 2, interpolations=["bicubic"] * 2,
  means=[[0.485, 0.456, 0.406], [0.5] * 3],
  stds=[[0.229, 0.224, 0.225], [0.5] * 3], tvf_do_letterbox=False,
)  # fmt: skip
# Prompts with the placeholder behind the first token, and one without.
PROMPTS = ([1, PAD, 7, 9, 3, 11], [1, PAD, 4], [1, 5, 6], [1, PAD, 8, 30, 31])
NEXT = np.random.default_rng(2).integers(3, 48, (STEPS, len(PROMPTS)))


def write(folder, theirs, config):
  state = {n: x.numpy() for n, x in theirs.state_dict().items()}
  files.write_file(folder / files.SINGLE, state)
  files.write_json(folder / "config.json", config)
  files.write_json(folder / "preprocessor_config.json", IMAGES)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("openvla")
  size = dict(img_size=SIDE)
  theirs = randomise(Prismatic({**DINO, **size}, {**SIGLIP, **size}, TEXT))
  write(folder, theirs, OPENVLA)
  return theirs, folder, interop.load(folder)


def pixels_of(inputs):
  """Images of each prompt."""
  left = [inputs.preprocessing(photo) for photo in photos([(20, 30)] * 3)]
  return [[left.pop()] if PAD in ids else [] for ids in PROMPTS]


def see(model, params, images):
  """Visual tokens."""
  call = lambda p, x: model.apply({"params": p}, x, method="see")[0]
  return jax.jit(call)(params, jnp.asarray(images, jnp.float32))


def generator(model, params):
  return VisionLanguageGenerator(
    model, params, capacity=32, decode=STEPS, buckets=(32,)
  )


def test_prefill_and_decode_equal_the_reference(loaded, record_property):
  """A ragged batch; as many steps as an action has dimensions."""
  theirs, _, (model, params, inputs) = loaded
  images, made = pixels_of(inputs), generator(model, params)
  assert made.image_tokens == 9
  found = answers(made, PROMPTS, images, NEXT)
  for i, ids in enumerate(PROMPTS):
    own = [token for token in ids if token != PAD]
    pixels = None
    if images[i]:
      pixels = torch.tensor(images[i][0]).permute(2, 0, 1)[None]
    whole = torch.tensor([[*own, *NEXT[:, i]]])
    with torch.no_grad():
      expected = theirs(whole, pixels)[0, -STEPS - 1 :].numpy()
    assert np.abs(expected).max() > 0.5
    worst = np.abs(found[i] - expected).max()
    record_property("max_abs_difference", float(worst))
    assert worst < BOUND, i


def test_images_are_those_of_each_encoder(loaded):
  """Each normalised by itself; resized without keeping proportions."""
  _, _, (_, _, inputs) = loaded
  photo = photos([(20, 30)])[0]
  small = Image.fromarray(photo).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
  plain = np.asarray(small, np.float32) / 255
  of = lambda i: (plain - IMAGES["means"][i]) / IMAGES["stds"][i]
  expected = np.concatenate([of(0), of(1)], axis=-1)
  np.testing.assert_allclose(inputs.preprocessing(photo), expected, atol=1e-6)


def test_actions_of_tokens(loaded):
  _, _, (_, _, inputs) = loaded
  actions = inputs.actions
  assert actions.vocabulary == 48 and actions.dimensions("bridge") == 7
  # Bins of width 1/4, counted down from the last id; others are clipped.
  ids = [47, 46, 45, 41, 40, 3, 44]
  found = actions.decode(ids, "bridge")
  np.testing.assert_allclose(found[:2], [-0.4375, 0.1875])
  np.testing.assert_allclose(found, actions_of(ids, OPENVLA, "bridge"))
  inner = np.array([0.3, -0.2])
  again = actions.decode(actions.encode(inner, "two"), "two")
  assert np.abs(again - inner).max() <= 0.25 * 2 / 2
  with pytest.raises(ValueError, match=r"dataset=None.*\['bridge', 'two'\]"):
    actions.decode(ids)
  with pytest.raises(ValueError, match="shape.*7 dimensions"):
    actions.decode(ids[:3], "bridge")


def test_features_of_both_encoders_follow_one_plan(loaded):
  """FasterVLM asks the first encoder; kept tokens are those of the whole."""
  _, folder, (plain, params, inputs) = loaded
  image = pixels_of(inputs)[0][0][None]
  whole = see(plain, params, image)
  model, own, _ = interop.load(folder, slots=recipes.get("fastervlm", keep=0.4))
  tokens = see(model, own, image)
  at = np.asarray(tokens.position[0], int)
  kept = at[:, 0] * 3 + at[:, 1]
  assert 3 <= len(kept) < 9
  expected = np.asarray(whole.x)[0, kept]
  np.testing.assert_allclose(tokens.x[0], expected, atol=1e-5)
  # The same rule at the block ahead, and one that the encoders cannot follow.
  assert interop.load(folder, slots=recipes.get("prumerge", keep=0.4))
  with pytest.raises(ValueError, match="visionzip.*'vision'.*class token"):
    interop.load(folder, slots=recipes.get("visionzip", keep=0.4))


def test_one_encoder_has_a_projector_of_two_layers(tmp_path):
  """A Prismatic model without actions."""
  theirs = randomise(Prismatic({**SIGLIP, "img_size": SIDE}, None, TEXT))
  config = {
    **OPENVLA, "architectures": ["PrismaticForConditionalGeneration"],
    "timm_model_ids": OPENVLA["timm_model_ids"][1:],
    "timm_model_args": [SIGLIP], "image_sizes": [SIDE],
    "timm_override_act_layers": None, "use_fused_vision_backbone": False,
  }  # fmt: skip
  write(tmp_path, theirs, config)
  (tmp_path / "preprocessor_config.json").unlink()
  model, params, inputs = interop.load(tmp_path)
  assert inputs.actions is None and inputs.preprocessing is None
  image = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 3))
  tokens = see(model, params, image)
  pixels = torch.tensor(image, dtype=torch.float32).permute(0, 3, 1, 2)
  with torch.no_grad():
    expected = theirs.projector(theirs.vision_backbone(pixels)).numpy()
  np.testing.assert_allclose(tokens.x, expected, atol=1e-5)


def test_clip_joined_to_dino(tmp_path):
  """Norms of CLIP are others, and its activation is overridden."""
  clip = dict(
    embed_dim=16, depth=3, num_heads=2, mlp_ratio=2.0, patch_size=4,
    pre_norm=True,
  )  # fmt: skip
  size = dict(img_size=SIDE)
  # An epsilon that matters needs small features.
  theirs = randomise(
    Prismatic(
      {**DINO, **size}, {**clip, **size, "quick": True, "epsilon": 1e-5}, TEXT
    )
  )
  fused = theirs.vision_backbone.fused_featurizer
  fused.pos_embed.data *= 1e-3
  fused.patch_embed.proj.weight.data *= 1e-3
  fused.cls_token.data *= 1e-3
  config = {
    **OPENVLA, "architectures": ["PrismaticForConditionalGeneration"],
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m",
                       "vit_large_patch14_clip_336.openai"],
    "timm_model_args": [DINO, clip],
    "timm_override_act_layers": [None, "quick_gelu"],
  }  # fmt: skip
  write(tmp_path, theirs, config)
  model, params, _ = interop.load(tmp_path)
  image = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 6))
  pixels = torch.tensor(image, dtype=torch.float32).permute(0, 3, 1, 2)
  with torch.no_grad():
    expected = theirs.projector(theirs.vision_backbone(pixels)).numpy()
  tokens = see(model, params, image)
  np.testing.assert_allclose(tokens.x, expected, atol=2e-5)
  assert model.config.fused.epsilon == 1e-5
  # Sizes that no argument changes are those of the published encoder.
  made = interop.prismatic.encoder(
    "vit_large_patch14_clip_336.openai", 336, "quick_gelu", None
  )
  assert (made.width, made.depth, made.num_patches) == (1024, 23, 576)


def test_letterbox_pads_with_the_mean_of_the_last_encoder(tmp_path):
  files.write_json(tmp_path / "config.json", OPENVLA)
  files.write_json(
    tmp_path / "preprocessor_config.json",
    {**IMAGES, "image_resize_strategy": "letterbox", "tvf_do_letterbox": True},
  )
  made = prismatic_images.read(tmp_path, 6)
  white = np.full((14, 6, 3), 255, np.uint8)
  found = made(white)
  np.testing.assert_allclose(found[7, 7, 3:], 1, atol=1e-6)
  # int(0.5 * 255) is 127.
  np.testing.assert_allclose(found[7, 0, 3:], 127 / 127.5 - 1, atol=1e-6)


def test_what_is_not_read_is_refused(loaded, tmp_path):
  _, folder, _ = loaded
  (tmp_path / files.SINGLE).write_bytes((folder / files.SINGLE).read_bytes())
  for change, message in (
    ({"timm_model_ids": ["vit_huge", "x"]}, "timm_model_ids='vit_huge'"),
    ({"use_fused_vision_backbone": False}, "1 names, since"),
    ({"image_sizes": [14]}, "image_sizes=.14.: must be 2 integers"),
    ({"image_sizes": [14, 18]}, "fused: has a grid of .4, 4."),
    ({"timm_model_args": [DINO, {"swiglu": 1}]}, "'swiglu'. are not supported"),
    ({"norm_stats": None}, "norm_stats: has no data set"),
    ({"norm_stats": {"a": {"action": {"q01": [1], "q99": []}}}}, "stats.a.act"),
    ({"text_config": {"model_type": "phi"}}, "model_type='phi'"),
  ):
    files.write_json(tmp_path / "config.json", {**OPENVLA, **change})
    with pytest.raises(ValueError, match=f"config.json(?s:.)*{message}"):
      interop.load(tmp_path)
  files.write_json(tmp_path / "config.json", OPENVLA)
  files.write_json(
    tmp_path / "preprocessor_config.json",
    {**IMAGES, "image_resize_strategy": "squash", "pad": 3},
  )
  with pytest.raises(ValueError, match=r"pad=3(?s:.)*strategy='squash'"):
    interop.load(tmp_path)


@pytest.fixture(scope="module")
def spoken(loaded):
  """The folder with a tokenizer."""
  folder = loaded[1]
  words = {f"w{i}": i for i in range(46) if i != PAD} | {"\u2581": 46}
  level = tokenizers.models.WordLevel(words, unk_token="w0")
  whole = tokenizers.Tokenizer(level)
  whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  whole.save(str(folder / "tokenizer.json"))
  return folder


def test_pictures_show_what_the_first_encoder_saw(spoken, tmp_path):
  Image.fromarray(photos([(20, 30)])[0]).save(tmp_path / "a.png")
  given = dict(
    image=[str(tmp_path / "a.png")], prompt="w1 w7", keep=0.4, block=None,
    size=384, patch=16, out=str(tmp_path), checkpoint=str(spoken),
    recipe="fastervlm",
  )  # fmt: skip
  pictures.from_command_line(type("Given", (), given))
  with Image.open(tmp_path / "a_fastervlm.png") as image:
    assert min(image.size) > 200


def test_generate_prints_the_action_of_an_image(loaded, spoken, tmp_path):
  folder, (model, params, inputs) = spoken, loaded[2]
  photo = photos([(20, 30)])[0]
  Image.fromarray(photo).save(tmp_path / "a.png")
  config = generate.Generate(
    Pretrained(str(folder)), capacity=32, dataset="bridge"
  )
  said = []
  out = generate.main(
    config, tmp_path, "w1 w7", said.append, images=[tmp_path / "a.png"]
  )
  made = VisionLanguageGenerator(model, params, capacity=32, decode=STEPS)
  pixels = inputs.preprocessing(photo)
  (ids,) = made.generate([[1, PAD, 7, 46]], [[pixels]])
  assert list(out.ids) == ids and len(ids) == 7
  np.testing.assert_allclose(out.action, actions_of(ids, OPENVLA, "bridge"))
  assert f"action: {out.action[0]:.4g} " in said[-1]
  for changes, text, message in (
    (dict(dataset="x"), "w1", r"dataset='x'.*\['bridge', 'two'\]"),
    (dict(stop=("w",)), "w1", "as many tokens as an action has dimensions"),
    ({}, "<image> w1", "behind the first token"),
  ):
    other = dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match=message):
      generate.main(other, tmp_path, text, images=[tmp_path / "a.png"])
