"""Qwen2-VL and Qwen2.5-VL equal `transformers`: patches, positions, logits."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tests.interop.references import randomise
from tests.interop.vlm_parity import assert_equal, photos
from tokjax import interop
from tokjax.interop import files, qwen_vl
from tokjax.interop.preprocessing_files import HF_FILE
from tokjax.models import Rotary, VisionLanguageGenerator
from tokjax.models.native_patches import Clip

IMAGE, STEPS = 50, 3
TEXT = dict(
  vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
  rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
  rope_parameters={
    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
  },
)  # fmt: skip
# For longer contexts, with several axes.
YARN = {
  **TEXT["rope_parameters"], "rope_type": "yarn", "factor": 2.0,
  "original_max_position_embeddings": 64,
}  # fmt: skip
TEXTS = {"Qwen2VL": TEXT, "Qwen2_5_VL": {**TEXT, "rope_parameters": YARN}}
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


def make(name: str):
  """A reference model with every parameter drawn."""
  config = getattr(transformers, f"{name}Config")(
    vision_config=VISION[name], text_config=TEXTS[name], **TOKENS
  )
  config._attn_implementation = "eager"
  kind = getattr(transformers, f"{name}ForConditionalGeneration")
  return randomise(kind(config))


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


def given(ids, own):
  """What else the reference is called with."""
  if not own:
    return dict(use_cache=False)
  return dict(
    pixel_values=torch.tensor(np.concatenate([x.pixels for x in own])),
    image_grid_thw=torch.tensor([[1, *x.grid.tolist()] for x in own]),
    mm_token_type_ids=(torch.tensor([ids]) == IMAGE).int(),
    use_cache=False,
  )


def test_patches_are_those_of_the_reference(loaded):
  _, processor, _, (_, _, inputs) = loaded
  more = [np.zeros(size, np.uint8) for size in ((1, 1, 3), (1, 190, 3))]
  for photo in (*photos(SIZES), *more):
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
  cut = [inputs.preprocessing(photo) for photo in photos(SIZES)]
  images = [[cut[i] for i in own] for own in OF]
  assert len({x.grid.tobytes() for of_one in images for x in of_one}) == 3
  made = VisionLanguageGenerator(
    model, params, capacity=64, decode=STEPS, buckets=(64,), size_buckets=(24,)
  )
  assert_equal(theirs, made, PROMPTS, images, NEXT, given, record_property)


def test_clips_have_an_axis_of_time(loaded):
  """Three parts and two of them in a ragged batch; positions and logits."""
  theirs, _, _, (model, params, inputs) = loaded
  old = model.config.vision.window is None
  # The newer one has 2 positions a second, here 1.5 seconds apart.
  step = 1.0 if old else 1.5 * model_rate(theirs)
  rng = np.random.default_rng(5)
  part = inputs.preprocessing(photos(SIZES)[0])
  draw = lambda: part._replace(
    pixels=rng.normal(size=part.pixels.shape).astype(np.float32)
  )
  clips = [Clip(tuple(draw() for _ in range(n)), step) for n in (3, 2)]
  prompts = [[1, 7, IMAGE, 9, 3], [1, IMAGE, 4, 6, 8]]
  made = VisionLanguageGenerator(
    model, params, capacity=128, decode=STEPS, buckets=(128,),
    size_buckets=(24,),
  )
  going = made.prefill(prompts, [[clip] for clip in clips])
  for i, (ids, clip) in enumerate(zip(prompts, clips, strict=True)):
    count, grid = len(clip.parts), part.grid.tolist()
    tokens = count * grid[0] * grid[1] // 4
    whole = [t for x in ids for t in ([51] * tokens if x == IMAGE else [x])]
    more = {} if old else {"second_per_grid_ts": torch.tensor([1.5])}
    with torch.no_grad():
      out = theirs(
        input_ids=torch.tensor([whole]),
        pixel_values_videos=torch.tensor(
          np.concatenate([x.pixels for x in clip.parts])
        ),
        video_grid_thw=torch.tensor([[count, *grid]]),
        mm_token_type_ids=2 * (torch.tensor([whole]) == 51).int(),
        **more,
      )  # fmt: skip
    np.testing.assert_allclose(
      going.logits[i], out.logits[0, -1].numpy(), atol=2e-5
    )
  with pytest.raises(ValueError, match="a Clip has 0 parts"):
    made.prefill(prompts[:1], [[Clip(())]])


def model_rate(theirs) -> float:
  """Positions a second."""
  return theirs.config.vision_config.tokens_per_second


def flat(whole: dict) -> dict:
  """A config.json as published: no text_config, older names."""
  text = dict(whole.pop("text_config"))
  rope = text.pop("rope_parameters")
  for name in ("model_type", "layer_types", "sliding_window", "pad_token_id"):
    text.pop(name)
  vision = dict(whole["vision_config"])
  vision["in_chans"] = vision.pop("in_channels")
  vision |= {"spatial_patch_size": vision["patch_size"]}
  del vision["rope_parameters"], vision["model_type"]
  base, kind = rope.pop("rope_theta"), rope.pop("rope_type")
  scaling = {**rope, "type": "mrope" if kind == "default" else kind}
  return {
    **whole, **text, "vision_config": vision, "rope_scaling": scaling,
    "rope_theta": base, "sliding_window": 32_768,
  }  # fmt: skip


def resolved(config):
  """Without the window of sliding layers, of which there are none."""
  language = qwen_vl.LANGUAGE.resolved(config.language)
  return dataclasses.replace(config, language=language)


def in_memory(name: str) -> str:
  """As the model's own state has it."""
  if name.startswith("visual."):
    return f"model.{name}"
  return name.replace("model.", "model.language_model.", 1)


def test_every_published_spelling_is_read(loaded, tmp_path):
  _, _, folder, (model, params, inputs) = loaded
  with files.opened(folder / files.SINGLE) as file:
    tensors = {in_memory(n): file.get_tensor(n) for n in file.keys()}
  assert "model.visual.merger.mlp.0.bias" in tensors
  files.save_file(tensors, tmp_path / files.SINGLE, metadata={"format": "pt"})
  whole = flat(files.read_json(folder / "config.json"))
  files.write_json(tmp_path / "config.json", whole)
  stated = files.read_json(folder / HF_FILE)
  size = stated.pop("size")
  stated["min_pixels"] = size["shortest_edge"]
  stated["max_pixels"] = size["longest_edge"]
  files.write_json(tmp_path / HF_FILE, stated)
  other, again, read = interop.load(tmp_path)
  assert resolved(other.config) == resolved(model.config)
  assert other.config.language.rotary.sections == (2, 3, 3)
  assert read.preprocessing == inputs.preprocessing
  assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


@pytest.mark.parametrize("loaded", ["Qwen2VL"], indirect=True)
def test_what_is_not_read_is_refused(loaded, tmp_path):
  _, _, folder, _ = loaded
  whole = files.read_json(folder / "config.json")
  text, vision = whole["text_config"], whole["vision_config"]
  rope = text["rope_parameters"]
  (tmp_path / files.SINGLE).write_bytes((folder / files.SINGLE).read_bytes())
  for change, message in (
    ({"text_config": {**text, "rope_parameters": {
      **rope, "mrope_section": [2, 2, 2]}}}, "sections.*must sum to 8"),
    ({"text_config": {**text, "rope_parameters": {
      **rope, "mrope_interleaved": True}}}, "mrope_interleaved"),
    ({"text_config": {**text, "rope_parameters": {
      **rope, "rope_type": "dynamic", "factor": 2.0}}}, "scaling='dynamic'"),
    ({"vision_config": {**vision, "hidden_act": "relu6"}}, "hidden_act"),
    ({"vision_config": {**vision, "hidden_size": 24}}, "width 24.*32"),
    ({"vision_config": {**vision, "embed_dim": 30}}, "width=30.*multiple of 8"),
    ({"image_token_id": 99}, "image_token=99"),
    ({"architectures": ["Qwen3VLForConditionalGeneration"]}, "names.*Qwen3VL"),
    ({"architectures": ["Idefics3ForConditionalGeneration"]}, "names.*Idefics"),
  ):
    files.write_json(tmp_path / "config.json", {**whole, **change})
    with pytest.raises(ValueError, match=f"config.json(?s:.)*{message}"):
      interop.load(tmp_path)
  files.write_json(tmp_path / "config.json", whole)
  stated = files.read_json(folder / HF_FILE)
  for change, message in (
    ({"patch_size": 5}, "patch_size=5: must be 4, as in config.json"),
    ({"do_resize": False}, "do_resize=False"),
    ({"do_pad": True}, "do_pad=True is not supported"),
    ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
    ({"size": {"height": 4}}, "size.*without.*height"),
    ({"min_pixels": 5000}, "least=5000, most=1200"),
  ):
    files.write_json(tmp_path / HF_FILE, {**stated, **change})
    with pytest.raises(ValueError, match=f"{HF_FILE}(?s:.)*{message}"):
      interop.inputs_of(tmp_path)


# Of Qwen2.5-VL-7B-Instruct, without what says nothing of shapes. Qwen2-VL-7B
# has other vision_config.
PUBLISHED = dict(
  hidden_act="silu", hidden_size=3584, image_token_id=151_655,
  intermediate_size=18_944, max_position_embeddings=128_000,
  max_window_layers=28, model_type="qwen2_5_vl", num_attention_heads=28,
  num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-6,
  rope_theta=1e6, sliding_window=32_768, tie_word_embeddings=False,
  use_sliding_window=False, vocab_size=152_064,
  rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
)  # fmt: skip


def test_files_that_say_little_have_the_defaults_of_the_reference():
  read = lambda name, **vision: qwen_vl.QWEN_VL[name].read(
    {**PUBLISHED, "vision_config": vision}
  )
  new = read(
    "Qwen2_5_VLForConditionalGeneration", hidden_size=1280, in_chans=3,
    out_hidden_size=3584, tokens_per_second=2,
  )  # fmt: skip
  vision = new.vision
  assert (vision.depth, vision.mlp_dim, vision.window) == (32, 3420, 8)
  assert vision.full == (7, 15, 23, 31) and vision.patch_features == 1176
  assert (vision.norm, vision.gated, vision.activation) == ("rms", True, "silu")
  assert new.language.rotary == Rotary(1e6, sections=(16, 24, 24))
  assert new.projector.hidden == 5120 and new.projector.norm == "rms"
  old = read("Qwen2VLForConditionalGeneration", embed_dim=1280, mlp_ratio=4)
  assert (old.vision.mlp_dim, old.vision.window) == (5120, None)
  assert (old.vision.norm, old.vision.activation) == ("layer", "quick_gelu")
