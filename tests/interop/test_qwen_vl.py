"""Qwen2-VL and Qwen2.5-VL equal `transformers`: patches, positions, logits."""

import jax
import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tests.interop.references import randomise
from tokjax import interop
from tokjax.interop import files
from tokjax.models import VisionLanguageGenerator

# The requirement is 1e-4.
BOUND = 2e-5
IMAGE, STEPS = 50, 3
TEXT = dict(
  vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
  rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
  rope_parameters={
    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
  },
)  # fmt: skip
TOKENS = dict(
  image_token_id=IMAGE, video_token_id=51, vision_start_token_id=52,
  vision_end_token_id=53,
)
VISION = {
  "Qwen2VL": dict(
    depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2,
    patch_size=4,
  ),
  "Qwen2_5_VL": dict(
    depth=3, hidden_size=32, out_hidden_size=32, num_heads=2,
    intermediate_size=40, patch_size=4, window_size=16,
    fullatt_block_indexes=[1, 7],
  ),
}  # fmt: skip
PIXELS = {"shortest_edge": 128, "longest_edge": 1200}
SIZES = ((30, 17), (9, 40), (12, 12), (50, 7))
# Prompts with one placeholder an image, and the images of each.
PROMPTS = ([1, 7, IMAGE, 9, 3, IMAGE, 11], [1, 5, 6], [IMAGE, 8])
OF = ((0, 1), (), (3,))
NEXT = np.random.default_rng(2).integers(3, 40, (STEPS, len(PROMPTS)))


def make(name: str, text=None, **vision):
  """A reference model with every parameter drawn."""
  config = getattr(transformers, f"{name}Config")(
    vision_config={**VISION[name], **vision}, text_config=text or TEXT, **TOKENS
  )
  config._attn_implementation = "eager"
  kind = getattr(transformers, f"{name}ForConditionalGeneration")
  return randomise(kind(config))


def photos() -> list[np.ndarray]:
  rng = np.random.default_rng(4)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture(scope="module", params=VISION)
def loaded(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  theirs = make(request.param)
  theirs.save_pretrained(folder)
  processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
    size=PIXELS, patch_size=4
  )
  processor.save_pretrained(folder)
  return theirs, processor, folder, interop.load(folder)


def their_logits(model, ids, own, count):
  """Of the last token of the prompt and of the tokens that follow."""
  whole = torch.tensor([ids])
  given = {}
  if own:
    given = dict(
      pixel_values=torch.tensor(np.concatenate([x.pixels for x in own])),
      image_grid_thw=torch.tensor([[1, *x.grid.tolist()] for x in own]),
      mm_token_type_ids=(whole == IMAGE).int(),
    )
  with torch.no_grad():
    logits = model(input_ids=whole, use_cache=False, **given).logits[0]
  return logits[-1 - count :].numpy()


def test_patches_are_those_of_the_reference(loaded):
  _, processor, _, (_, _, inputs) = loaded
  more = [np.zeros(size, np.uint8) for size in ((1, 1, 3), (1, 190, 3))]
  for photo in (*photos(), *more):
    expected = processor(
      photo, return_tensors="np", input_data_format="channels_last"
    )
    ours = inputs.preprocessing(photo)
    assert [1, *ours.grid] == expected["image_grid_thw"][0].tolist()
    assert ours.pixels.dtype == np.float32
    np.testing.assert_allclose(
      ours.pixels, expected["pixel_values"], atol=1e-6
    )
  with pytest.raises(ValueError, match="201x1.*200 times"):
    inputs.preprocessing(np.zeros((1, 201, 3), np.uint8))


def test_prefill_and_decode_equal_the_reference(loaded, record_property):
  """A ragged batch with none to two images a prompt, of different sizes."""
  theirs, _, _, (model, params, inputs) = loaded
  cut = [inputs.preprocessing(photo) for photo in photos()]
  images = [[cut[i] for i in own] for own in OF]
  assert len({x.grid.tobytes() for of_one in images for x in of_one}) == 3
  made = VisionLanguageGenerator(
    model, params, capacity=64, decode=STEPS, buckets=(64,), size_buckets=(24,)
  )
  packed, _ = made.pack(PROMPTS, images)
  going = made.prefill(PROMPTS, images)
  found = [np.asarray(going.logits)]
  for token in NEXT:
    going = made.step(going, token.astype(np.int32))
    found.append(np.asarray(going.logits))
  found = np.stack(found, axis=1)
  for i, own in enumerate(images):
    ids = packed.tokens[i, : packed.length[i]].tolist()
    expected = their_logits(theirs, [*ids, *NEXT[:, i]], own, STEPS)
    assert np.abs(expected).max() > 0.5
    worst = np.abs(found[i] - expected).max()
    record_property("max_abs_difference", float(worst))
    assert worst < BOUND, i
