"""LLaVA-OneVision equals `transformers`: large grids, several images."""

import dataclasses

import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tests.interop.references import randomise
from tests.interop.vlm_parity import BOUND, answers, assert_equal, photos
from tokjax import interop, recipes
from tokjax.interop import files
from tokjax.models import (
  VisionLanguageGenerator,
  any_resolution,
  native_patches,
)
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
# Frames of videos have a placeholder together.
VIDEOS = ([1, 7, IMAGE, 11], [1, 5], [IMAGE, 8, IMAGE, 4, 9])
# Of 8 bits, where the smallest standard deviation is a quarter.
ONE_LEVEL = 1.01 / 255 / 0.25
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


def of_videos(inputs) -> list[list[native_patches.Clip]]:
  """Videos of three frames and of two, and a prompt without one."""
  clips = [inputs.preprocessing.video(photos([(30, 27)] * n)) for n in (3, 2)]
  return [clips[:1], [], [clips[1], clips[0]]]


def test_videos_equal_the_reference(loaded, record_property):
  """Frames of half the sides, one newline at the end; a ragged batch."""
  theirs, _, _, (model, params, inputs) = loaded
  clips = of_videos(inputs)
  made = VisionLanguageGenerator(
    model, params, capacity=64, decode=STEPS, buckets=(64,)
  )
  packed, _ = made.pack(VIDEOS, clips)
  # Frames have 3 x 3 tokens, which are 2 x 2.
  assert packed.length.tolist() == [3 + 4 * 3 + 1, 2, 3 + 4 * 5 + 2]
  newline = np.asarray(packed.kind) == Kind.NEWLINE
  assert newline.sum(axis=1).tolist() == [1, 0, 2]

  def logits(ids, own, following):
    embed = theirs.get_input_embeddings()
    whole = torch.tensor([[*ids, *following]])
    with torch.no_grad():
      x, at = embed(whole), whole[0] == IMAGE
      seen = [
        theirs.model.get_video_features(
          torch.tensor(np.stack(clip.parts)[None]).permute(0, 1, 4, 2, 3),
          return_dict=True,
        ).pooler_output[0]
        for clip in own
      ]
      if seen:
        x[0, at] = torch.cat(seen)
      found = theirs(inputs_embeds=x).logits[0]
    return found[len(ids) - 1 :].numpy()

  after = NEXT[:, : len(VIDEOS)]
  found = answers(made, VIDEOS, clips, after)
  for i, own in enumerate(clips):
    ids = packed.tokens[i, : packed.length[i]].tolist()
    expected = logits(ids, own, after[:, i])
    assert np.abs(expected).max() > 0.5
    worst = np.abs(found[i] - expected).max()
    record_property("max_abs_difference", float(worst))
    assert worst < BOUND, i
  # The processor of the whole model takes one video of a prompt.
  video = np.stack(clips[0][0].parts)[None].transpose(0, 1, 4, 2, 3)
  ids = np.where(packed.tokens[0] == IMAGE, 51, packed.tokens[0])
  with torch.no_grad():
    expected = theirs(
      input_ids=torch.tensor(ids[None, : packed.length[0]]),
      pixel_values_videos=torch.tensor(video),
    ).logits[0, -1]
  np.testing.assert_allclose(found[0][0], expected.numpy(), atol=BOUND)


def test_frames_of_videos_have_the_pixels_of_the_reference(loaded, tmp_path):
  """Its processor resizes with torch; `torchvision` is not needed for that."""
  _, _, folder, (_, _, inputs) = loaded
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  stated = dict(
    video_processor_type="LlavaOnevisionVideoProcessor", image_mean=[0.5] * 3,
    image_std=[0.25, 0.5, 0.5], size=dict(height=SIDE, width=SIDE),
    do_sample_frames=False, do_center_crop=None, crop_size=None,
    default_to_square=False, resample=3,
  )  # fmt: skip
  files.write_json(tmp_path / "video_preprocessor_config.json", stated)
  made = interop.load(tmp_path)[2].preprocessing
  frames = photos([(30, 27), (9, 40), (60, 50)])
  for frame, ours in zip(frames, made.video(frames).parts, strict=True):
    small = torch.nn.functional.interpolate(
      torch.tensor(frame).permute(2, 0, 1)[None], (SIDE, SIDE),
      mode="bicubic", antialias=True,
    )[0].permute(1, 2, 0)
    expected = (small.numpy() / 255 - 0.5) / np.array([0.25, 0.5, 0.5])
    np.testing.assert_allclose(ours, expected, atol=ONE_LEVEL)
  # Without that file frames are normalised as images are.
  plain = inputs.preprocessing
  np.testing.assert_array_equal(
    plain.video(frames[:1]).parts[0], plain.crop(frames[0])
  )
  stated["video_processor_type"] = "Qwen2VLVideoProcessor"
  files.write_json(tmp_path / "video_preprocessor_config.json", stated)
  with pytest.raises(ValueError, match="video_processor_type='Qwen2VL"):
    interop.load(tmp_path)


def test_videos_and_recipes(loaded):
  """Frames that a tower reduces are not pooled; others are, then reduced."""
  _, _, folder, (_, _, inputs) = loaded
  clips = of_videos(inputs)
  for slots, length in (
    (recipes.get("divprune", keep=0.5), 3 + 3 * 4),
    (recipes.get("fastv", layer=1, keep=0.5), 3 + 4 * 3 + 1),
  ):
    model, params, _ = interop.load(folder, slots=slots)
    made = VisionLanguageGenerator(model, params, capacity=64, decode=2)
    packed, _ = made.pack(VIDEOS, clips)
    assert packed.length[0] == length
  assert len(made.generate(VIDEOS, clips)) == len(VIDEOS)
  (clip,) = clips[0]
  for bad, message in (
    (dataclasses.replace(clip, step=2.0), "step=2.0"),
    (dataclasses.replace(clip, parts=()), "0 parts"),
    (
      dataclasses.replace(clip, parts=(clip.parts[0], clip.parts[0][:7])),
      "of one shape",
    ),
    (
      dataclasses.replace(clip, parts=(clip.parts[0][:7],)),
      r"shape \(7, 14, 3\)",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      made.pack(VIDEOS[:1], [[bad]])


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
