"""InternVL equals `transformers`: tiles, pixel shuffle, logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tests.interop.references import randomise
from tests.interop.vlm_parity import assert_equal, photos
from tokjax import budgets, interop, recipes
from tokjax.interop import files
from tokjax.models import VisionLanguageGenerator, ViT
from tokjax.recipes.multimodal.encoder import CLASS_MEAN
from tokjax.slots import Slots

IMAGE, STEPS, SIDE = 50, 3, 16
VISION = dict(
  hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
  intermediate_size=40, image_size=(SIDE, SIDE), patch_size=(4, 4),
  attention_bias=True,
)  # fmt: skip
TEXT = dict(
  model_type="qwen2", vocab_size=60, hidden_size=24, intermediate_size=48,
  num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
  max_position_embeddings=256,
)  # fmt: skip
SIZES = ((30, 17), (9, 40), (12, 12), (1, 1), (50, 7), (40, 40))
PROMPTS = ([1, 7, IMAGE, 9, IMAGE, 11], [1, 5, 6], [IMAGE, 8, 3])
OF = ((0, 1), (), (2,))
NEXT = np.random.default_rng(2).integers(3, 40, (STEPS, len(PROMPTS)))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("internvl")
  config = transformers.InternVLConfig(
    vision_config=VISION, text_config=TEXT, image_token_id=IMAGE,
    image_seq_length=4,
  )  # fmt: skip
  config._attn_implementation = "eager"
  theirs = randomise(transformers.InternVLForConditionalGeneration(config))
  theirs.save_pretrained(folder)
  processor = transformers.models.got_ocr2.GotOcr2ImageProcessorPil(
    size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=5
  )
  processor.save_pretrained(folder)
  return theirs, processor, folder, interop.load(folder)


def test_tiles_are_those_of_the_reference(loaded):
  _, processor, _, (_, _, inputs) = loaded
  counts = []
  for photo in photos(SIZES):
    expected = processor(
      photo, return_tensors="np", input_data_format="channels_last"
    )
    ours = inputs.preprocessing(photo)
    counts.append(len(ours.pixels))
    assert expected["num_patches"].tolist() == [len(ours.pixels)]
    pixels = expected["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours.pixels, pixels, atol=1e-6)
  assert counts == [3, 5, 1, 1, 6, 5]


def test_prefill_and_decode_equal_the_reference(loaded, record_property):
  """A ragged batch with none to two images a prompt, of one to five tiles."""
  theirs, _, _, (model, params, inputs) = loaded
  cut = [inputs.preprocessing(photo) for photo in photos(SIZES)]
  images = [[cut[i] for i in own] for own in OF]
  made = VisionLanguageGenerator(
    model, params, capacity=64, decode=STEPS, buckets=(64,)
  )
  assert made.image_tokens == 4

  def given(ids, own):
    del ids
    if not own:
      return {}
    pixels = np.concatenate([x.pixels for x in own]).transpose(0, 3, 1, 2)
    return dict(pixel_values=torch.tensor(pixels))

  assert_equal(theirs, made, PROMPTS, images, NEXT, given, record_property)


def test_recipes_act_on_merged_patches(loaded):
  """Each tile keeps as many tokens; the vision tower keeps all its patches."""
  _, _, folder, (_, _, inputs) = loaded
  image = inputs.preprocessing(photos(SIZES)[0])
  fastv = recipes.get("fastv", layer=1)
  snapkv = recipes.get("snapkv", window=2)
  slots = recipes.compose("avgpool_visual", fastv, snapkv, keep=0.25)
  model, params, _ = interop.load(folder, slots=slots)
  made = VisionLanguageGenerator(model, params, capacity=64, decode=2)
  assert made.image_tokens < 4
  packed, _ = made.pack([[1, IMAGE, 4]], [[image]])
  assert packed.length[0] == 2 + made.image_tokens * len(image.pixels)
  assert len(made.generate([[1, IMAGE, 4]], [[image]])[0]) == 2
  for name, message in (
    ("folder", "tower 'vision'.*of 16 patches.*within the projector"),
    ("visionzip", "'pass_class'.*2 x 2 patches"),
  ):
    with pytest.raises(ValueError, match=message):
      interop.load(folder, slots=recipes.get(name, keep=0.5))


def run(model, params, images, method=None):
  """A call of a model as one program."""
  call = lambda p, x: model.apply({"params": p}, x, method=method)
  return jax.jit(call)(params, jnp.asarray(images))


def test_towers_choose_merged_patches_by_the_mean_of_theirs(loaded):
  """FasterVLM: class attention of the last block, over 2 x 2 patches."""
  _, _, folder, (plain, params, inputs) = loaded
  crops = inputs.preprocessing(photos(SIZES)[0]).pixels
  tower = ViT(plain.config.vision, Slots(collect=(CLASS_MEAN,)))
  _, out = run(tower, params["vision"], crops)
  row = np.asarray(out["signals"][-1].values[0])[:, 1:]
  score = row.reshape(-1, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(-1, 4)
  best = np.sort(np.argsort(-score, axis=1)[:, :2], axis=1)
  slots = recipes.get("fastervlm", budget=budgets.Count(2))
  model, params, _ = interop.load(folder, slots=slots)
  tokens, _ = run(model, params, crops, method="see")
  at = np.asarray(tokens.position)
  np.testing.assert_array_equal(at[..., 0] * 2 + at[..., 1], best)
  whole, _ = run(plain, params, crops, method="see")
  expected = np.take_along_axis(np.asarray(whole.x), best[..., None], axis=1)
  np.testing.assert_allclose(tokens.x, expected, atol=1e-5)
  made = VisionLanguageGenerator(model, params, capacity=32, decode=1)
  assert made.image_tokens == 2


def test_what_is_not_read_is_refused(loaded, tmp_path):
  _, _, folder, _ = loaded
  whole = files.read_json(folder / "config.json")
  vision = whole["vision_config"]
  (tmp_path / files.SINGLE).write_bytes((folder / files.SINGLE).read_bytes())
  for change, message in (
    ({"vision_config": {**vision, "norm_type": "rms_norm"}}, "norm_type"),
    ({"vision_config": {**vision, "use_qk_norm": True}}, "use_qk_norm=True"),
    ({"vision_config": {**vision, "use_mean_pooling": False}}, "mean_pooling"),
    ({"downsample_ratio": 0.3}, "downsample_ratio=0.3: must be 1 over"),
    ({"downsample_ratio": 0.125}, "merge=8: must divide"),
    ({"vision_feature_select_strategy": "full"}, "strategy='full'"),
    ({"text_config": {"model_type": "phi"}}, "model_type='phi'"),
  ):
    files.write_json(tmp_path / "config.json", {**whole, **change})
    with pytest.raises(ValueError, match=f"config.json(?s:.)*{message}"):
      interop.load(tmp_path)
