"""LLaVA-OneVision equals `transformers`: large grids, several images."""

import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tests.interop.references import randomise
from tests.interop.vlm_parity import assert_equal, photos
from tokjax import interop, recipes
from tokjax.interop import files
from tokjax.models import VisionLanguageGenerator, any_resolution
from tokjax.tokens import Kind

IMAGE, STEPS, SIDE = 50, 3, 14
# 14 pixels are 3 patches, and 2 that are left out.
VISION = dict(
  model_type="siglip_vision_model", hidden_size=24, intermediate_size=40,
  num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=4,
  vision_use_head=False,
)  # fmt: skip
TEXT = dict(
  model_type="qwen2", vocab_size=60, hidden_size=32, intermediate_size=48,
  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
  max_position_embeddings=256,
)  # fmt: skip
PINPOINTS = [[SIDE * y, SIDE * x] for y in range(1, 4) for x in range(1, 4)]
SIZES = ((30, 27), (9, 40), (12, 12), (50, 40))
# One image is seen in crops, several once.
PROMPTS = ([1, 7, IMAGE, 11], [1, IMAGE, 9, IMAGE, 4], [1, 5], [IMAGE, 8])
OF = ((0,), (1, 2), (), (3,))
NEXT = np.random.default_rng(2).integers(3, 40, (STEPS, len(PROMPTS)))
PROCESSOR = transformers.models.llava_onevision.LlavaOnevisionImageProcessorPil


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("onevision")
  config = transformers.LlavaOnevisionConfig(
    vision_config=VISION, text_config=TEXT, image_token_index=IMAGE,
    video_token_index=51, image_grid_pinpoints=PINPOINTS,
    vision_aspect_ratio="anyres_max_2",
  )  # fmt: skip
  config._attn_implementation = "eager"
  kind = transformers.LlavaOnevisionForConditionalGeneration
  theirs = randomise(kind(config))
  theirs.save_pretrained(folder)
  processor = PROCESSOR(
    size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
  )
  processor.save_pretrained(folder)
  return theirs, processor, folder, interop.load(folder)


def cut(inputs) -> list[list[any_resolution.Crops]]:
  """The images of each prompt."""
  seen, made = photos(SIZES), inputs.preprocessing
  how = lambda own: made if len(own) == 1 else made.once
  return [[how(own)(seen[i]) for i in own] for own in OF]


def test_images_have_the_pixels_of_the_reference(loaded):
  _, processor, _, (_, _, inputs) = loaded
  given = dict(return_tensors="np", input_data_format="channels_last")
  for photo in photos(SIZES):
    for images, ours in (
      ([photo], inputs.preprocessing(photo)),
      ([[photo, photo]], inputs.preprocessing.once(photo)),
    ):
      expected = processor(images, **given)
      assert ours.size == tuple(expected["image_sizes"][0])
      pixels = expected["pixel_values"][0].transpose(0, 2, 3, 1)
      np.testing.assert_allclose(ours.pixels, pixels, atol=1e-6)


def test_prefill_and_decode_equal_the_reference(loaded, record_property):
  theirs, _, _, (model, params, inputs) = loaded
  images = cut(inputs)
  made = VisionLanguageGenerator(
    model, params, capacity=64, decode=STEPS, buckets=(64,)
  )
  packed, _ = made.pack(PROMPTS, images)
  # The first grid is brought down: its tokens are means of several.
  largest = np.asarray(packed.mix.weight[0]).max(axis=-1)
  assert ((largest > 0) & (largest < 0.9)).any()

  def given(ids, own):
    del ids
    if not own:
      return {}
    pixels = np.stack([x.pixels for x in own]).transpose(0, 1, 4, 2, 3)
    return dict(
      pixel_values=torch.tensor(pixels),
      image_sizes=torch.tensor([x.size for x in own]),
      batch_num_images=torch.tensor([len(own)]),
    )

  assert_equal(theirs, made, PROMPTS, images, NEXT, given, record_property)


def test_weights_are_those_of_a_bilinear_resize():
  image = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
  for new in ((4, 5), (7, 9), (3, 9), (1, 1)):
    taps = map(any_resolution.linear_taps, image.shape, new)
    (row, of_row), (column, of_column) = taps
    ours = np.einsum(
      "yxij,yi,xj->yx", image[row[:, None, :, None], column[None, :, None]],
      of_row, of_column,
    )  # fmt: skip
    expected = torch.nn.functional.interpolate(
      torch.tensor(image)[None, None], new, mode="bilinear"
    )[0, 0]
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
  assert any_resolution.brought_down((6, 6), 36) == (6, 6)
  # Up to 1.1 times the side nothing happens.
  assert any_resolution.brought_down((11, 11), 100) == (11, 11)
  assert any_resolution.brought_down((6, 6), 18) == (4, 4)


def test_recipes_shorten_prompts(loaded):
  """Where crops keep fewer tokens than a grid, they stand without newlines."""
  _, _, folder, (_, _, inputs) = loaded
  images = cut(inputs)
  slots = recipes.compose("divprune", recipes.get("snapkv", window=2), keep=0.5)
  model, params, _ = interop.load(folder, slots=slots)
  made = VisionLanguageGenerator(model, params, capacity=64, decode=2)
  packed, _ = made.pack(PROMPTS, images)
  assert packed.mix is None and made.image_tokens < 9
  assert not (np.asarray(packed.kind) == Kind.NEWLINE).any()
  for i, own in enumerate(images):
    crops = sum(len(x.pixels) for x in own)
    text = len(PROMPTS[i]) - len(own)
    assert packed.length[i] == text + made.image_tokens * crops
  assert len(made.generate(PROMPTS, images)) == len(PROMPTS)
  with pytest.raises(ValueError, match="'CLASS'.*does not have"):
    interop.load(folder, slots=recipes.get("fastervlm"))


def test_what_is_not_read_is_refused(loaded, tmp_path):
  _, _, folder, _ = loaded
  whole = files.read_json(folder / "config.json")
  (tmp_path / files.SINGLE).write_bytes((folder / files.SINGLE).read_bytes())
  for change, message in (
    ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio='pad'"),
    ({"vision_feature_select_strategy": "default"}, "first token"),
    ({"image_grid_pinpoints": [[13, 14]]}, "pinpoints=.*multiples of 14"),
  ):
    files.write_json(tmp_path / "config.json", {**whole, **change})
    with pytest.raises(ValueError, match=f"config.json(?s:.)*{message}"):
      interop.load(tmp_path)
