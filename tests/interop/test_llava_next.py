"""LLaVA-NeXT equals `transformers`: images of any size, newlines."""

import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tests.interop.references import randomise
from tests.interop.test_llava import IMAGE, NEXT, TEXT, VISION
from tests.interop.vlm_parity import BOUND, answers
from tokjax import interop, recipes
from tokjax.models import VisionLanguageGenerator, any_resolution
from tokjax.tokens import Kind

PINPOINTS = [[12, 24], [24, 12], [24, 24], [36, 12]]
SIZES = ((30, 17), (9, 40), (12, 12), (1, 1), (50, 7))
PROMPTS = ([1, 7, IMAGE, 9, IMAGE, 11], [1, 5, 6], [IMAGE, 8, 3])
PROCESSOR = transformers.models.llava_next.LlavaNextImageProcessorPil


def make():
  """A reference model with every parameter drawn."""
  config = transformers.LlavaNextConfig(
    vision_config=transformers.CLIPVisionConfig(**VISION),
    text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE,
    image_grid_pinpoints=PINPOINTS,
  )  # fmt: skip
  config._attn_implementation = "eager"
  return randomise(transformers.LlavaNextForConditionalGeneration(config))


def photos() -> list[np.ndarray]:
  rng = np.random.default_rng(4)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("next")
  theirs = make()
  theirs.save_pretrained(folder)
  processor = PROCESSOR(
    size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12},
    image_grid_pinpoints=PINPOINTS,
  )  # fmt: skip
  processor.save_pretrained(folder)
  return theirs, processor, folder, interop.load(folder)


def test_images_have_the_pixels_of_the_reference(loaded):
  _, processor, _, (_, _, inputs) = loaded
  for photo in photos():
    expected = processor(
      photo, return_tensors="np", input_data_format="channels_last"
    )
    ours = inputs.preprocessing(photo)
    assert ours.size == tuple(expected["image_sizes"][0])
    pixels = expected["pixel_values"][0].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours.pixels, pixels, atol=1e-6)


def test_prefill_and_decode_equal_the_reference(loaded):
  theirs, _, _, (model, params, inputs) = loaded
  cut = [inputs.preprocessing(photo) for photo in photos()]
  images = [[cut[0], cut[1]], [], [cut[4]]]
  made = VisionLanguageGenerator(
    model, params, capacity=128, decode=3, buckets=(128,)
  )
  packed, _ = made.pack(PROMPTS, images)
  found = answers(made, PROMPTS, images, NEXT[:, :3])
  for i, own in enumerate(images):
    ids = packed.tokens[i, : packed.length[i]].tolist()
    whole = torch.tensor([[*ids, *NEXT[:, i]]])
    given = {}
    if own:
      most = max(len(x.pixels) for x in own)
      pad = lambda x, most=most: np.pad(
        x.pixels, ((0, most - len(x.pixels)), (0, 0), (0, 0), (0, 0))
      )
      pixels = np.stack([pad(x) for x in own]).transpose(0, 1, 4, 2, 3)
      sizes = torch.tensor([x.size for x in own])
      given = dict(pixel_values=torch.tensor(pixels), image_sizes=sizes)
    with torch.no_grad():
      expected = theirs(input_ids=whole, **given).logits[0, len(ids) - 1 :]
    assert np.abs(found[i] - expected.numpy()).max() < BOUND, i


def test_layouts_end_rows_and_leave_out_padding():
  points = tuple(map(tuple, PINPOINTS))
  assert any_resolution.best_size((1, 1), points) == (12, 24)
  assert any_resolution.best_size((500, 500), points) == (24, 24)
  # 9 x 40 within 12 x 24: rows of padding above and below are left out.
  rows, columns = any_resolution.unpadded((9, 40), (3, 6))
  assert (rows, columns) == (slice(1, 2), slice(0, 6))
  made = any_resolution.layout((9, 40), points, 12, (3, 3))
  row = [9 + 3, 9 + 4, 9 + 5, 18 + 3, 18 + 4, 18 + 5, any_resolution.NEWLINE]
  assert made.tolist() == [*range(9), *row]


def test_newlines_are_protected_and_reduced_crops_have_none(loaded):
  _, _, folder, (model, params, inputs) = loaded
  images = [[inputs.preprocessing(photos()[0])]]
  made = VisionLanguageGenerator(model, params, capacity=128, decode=1)
  packed, room = made.pack([[1, IMAGE]], images)
  kinds = np.asarray(packed.kind)[0, : packed.length[0]].tolist()
  assert kinds.count(Kind.NEWLINE) == 6 and dict(room)[Kind.NEWLINE] >= 6
  slots = recipes.get("fastervlm", keep=0.5)
  few, params, _ = interop.load(folder, slots=slots)
  made = VisionLanguageGenerator(few, params, capacity=128, decode=1)
  packed, _ = made.pack([[1, IMAGE]], images)
  assert packed.length[0] == 1 + made.image_tokens * len(images[0][0].pixels)
  wrong = images[0][0]._replace(pixels=images[0][0].pixels[:2])
  for given, message in (
    ([[wrong]], "has 2 crops; must be 5"),
    ([[wrong.pixels[0]]], "takes Crops"),
  ):
    with pytest.raises(ValueError, match=message):
      made.pack([[1, IMAGE]], given)
