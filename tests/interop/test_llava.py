"""LLaVA equals `transformers` on random weights, in float32."""

import jax
import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tests.interop.references import randomise
from tests.interop.vlm_parity import BOUND, answers
from tokjax import interop, recipes
from tokjax.interop import files
from tokjax.models import VisionLanguageGenerator

IMAGE, STEPS, PATCHES = 50, 3, 9
VISION = dict(
  hidden_size=24, intermediate_size=40, num_hidden_layers=3,
  num_attention_heads=4, image_size=12, patch_size=4,
)  # fmt: skip
TEXT = dict(
  vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
  rms_norm_eps=1e-5,
)  # fmt: skip
# Prompts with one placeholder an image, and how many images each has.
PROMPTS = (
  [1, 7, IMAGE, 9, 3, IMAGE, 11],
  [1, IMAGE, IMAGE, IMAGE, 4, 30, 31],
  [1, 5, 6],
  [IMAGE, 8],
)
NEXT = np.random.default_rng(2).integers(3, 40, (STEPS, len(PROMPTS)))
CASES = {
  "clip": {},
  "siglip-full": dict(
    vision="siglip", text="Qwen2", vision_feature_layer=-1,
    vision_feature_select_strategy="full", multimodal_projector_bias=False,
  ),
  "clip-full": dict(
    text="Mistral", vision_feature_layer=1,
    vision_feature_select_strategy="full",
    projector_hidden_act="gelu_pytorch_tanh",
  ),
}  # fmt: skip


def make(vision: str = "clip", text: str = "Llama", **options):
  """A reference model with every parameter drawn."""
  kinds = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}
  tower = getattr(transformers, kinds[vision])(**VISION)
  words = getattr(transformers, f"{text}Config")(**TEXT)
  config = transformers.LlavaConfig(
    vision_config=tower, text_config=words,
    image_token_index=IMAGE, image_seq_length=PATCHES, **options,
  )  # fmt: skip
  config._attn_implementation = "eager"
  return randomise(transformers.LlavaForConditionalGeneration(config))


def images(count: int, side: int = 12) -> list[np.ndarray]:
  rng = np.random.default_rng(1)
  return list(rng.normal(size=(count, side, side, 3)).astype(np.float32))


def of_prompts() -> list[list[np.ndarray]]:
  """Images of each prompt."""
  left = images(6)
  return [[left.pop(0) for t in p if t == IMAGE] for p in PROMPTS]


def their_logits(model, prompt, own, count):
  """Of the last token of the prompt and of the tokens that follow."""
  ids = [t for token in prompt[0] for t in [token] * (
    count if token == IMAGE else 1
  )]
  pixels = None
  if own:
    pixels = torch.tensor(np.stack(own)).permute(0, 3, 1, 2)
  whole = torch.tensor([[*ids, *prompt[1]]])
  with torch.no_grad():
    logits = model(input_ids=whole, pixel_values=pixels).logits[0]
  return logits[len(ids) - 1 :].numpy()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
  theirs = make(**CASES[request.param])
  folder = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(folder, max_shard_size="30KB")
  model, params, inputs = interop.load(folder)
  assert inputs.tokenizer is None and inputs.preprocessing is None
  return theirs, model, params


def test_prefill_and_decode_equal_the_reference(pair, record_property):
  """A ragged batch with none to three images a prompt."""
  theirs, model, params = pair
  made = VisionLanguageGenerator(
    model, params, capacity=64, decode=STEPS, buckets=(64,)
  )
  own = of_prompts()
  found = answers(made, PROMPTS, own, NEXT)
  for i, prompt in enumerate(PROMPTS):
    count = made.image_tokens
    expected = their_logits(theirs, (prompt, NEXT[:, i]), own[i], count)
    assert np.abs(expected).max() > 0.5
    worst = np.abs(found[i] - expected).max()
    record_property("max_abs_difference", float(worst))
    assert worst < BOUND, i


@pytest.mark.parametrize("pair", ["clip"], indirect=True)
def test_a_whole_sequence_equals_the_reference(pair):
  theirs, model, params = pair
  made = VisionLanguageGenerator(model, params, capacity=64, decode=1)
  own = of_prompts()
  packed, _ = made.pack(PROMPTS, own)
  logits, out = jax.jit(lambda p, x: model.apply({"params": p}, x))(
    params, packed
  )
  assert out["remains"].sum() == packed.length.sum()
  for i, prompt in enumerate(PROMPTS):
    expected = their_logits(theirs, (prompt, []), own[i], made.image_tokens)
    last = int(packed.length[i]) - 1
    assert np.abs(logits[i, last] - expected[0]).max() < BOUND


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint with a preprocessor_config.json."""
  made = tmp_path_factory.mktemp("whole")
  make().save_pretrained(made)
  transformers.models.llava.LlavaImageProcessorPil(
    size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
  ).save_pretrained(made)
  return made


def test_images_have_the_pixels_of_the_reference(folder):
  model, _, inputs = interop.load(folder)
  theirs = transformers.models.llava.LlavaImageProcessorPil.from_pretrained(
    folder
  )
  rng = np.random.default_rng(4)
  for shape in ((30, 17), (9, 40), (12, 12), (1, 1), (1, 50)):
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    expected = theirs(
      image, return_tensors="np", input_data_format="channels_last"
    )["pixel_values"][0].transpose(1, 2, 0)
    ours = inputs.preprocessing(image)
    assert ours.shape == (*model.config.vision.image_sides, 3)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def inner(name: str) -> str:
  """As folders of `transformers` before version 5 have it."""
  return name.replace("vision_tower.", "vision_tower.vision_model.")


def outer(name: str) -> str:
  """As the model's own state in memory."""
  name = f"model.{name}".replace("language_model.model.", "language_model.")
  return name.replace("model.language_model.lm_head.", "lm_head.")


@pytest.mark.parametrize("rename", [inner, outer])
def test_every_published_spelling_of_names_is_read(rename, folder, tmp_path):
  model, params, _ = interop.load(folder)
  with files.opened(folder / files.SINGLE) as file:
    tensors = {rename(n): file.get_tensor(n) for n in file.keys()}
  files.save_file(tensors, tmp_path / files.SINGLE, metadata={"format": "pt"})
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  other, again, _ = interop.load(tmp_path)
  assert other.config == model.config
  assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_what_config_json_asks_for_and_is_not_read_is_refused(folder, tmp_path):
  whole = files.read_json(folder / "config.json")
  vision = {**whole["vision_config"], "model_type": "siglip_vision_model"}
  for change, message in (
    ({"vision_feature_layer": [1, 2]}, "vision_feature_layer.*one integer"),
    ({"vision_feature_layer": -9}, "vision_feature_layer=-9.*3 of the encoder"),
    ({"vision_config": vision}, "'default'.*first token"),
    ({"vision_config": {"model_type": "pixtral"}}, "model_type='pixtral'"),
    ({"text_config": {"model_type": "phi"}}, "model_type='phi'"),
    ({"image_token_index": 99}, "image_token=99"),
    ({"projector_hidden_act": "relu6"}, "projector_hidden_act='relu6'"),
  ):
    files.write_json(tmp_path / "config.json", {**whole, **change})
    (tmp_path / files.SINGLE).write_bytes((folder / files.SINGLE).read_bytes())
    with pytest.raises(ValueError, match=f"config.json(?s:.)*{message}"):
      interop.load(tmp_path)
  with pytest.raises(ValueError, match="tower 'language'.*'tome'"):
    interop.load(folder, slots=recipes.get("tome"))
  model, _, _ = interop.load(folder, slots=recipes.get("visionzip", keep=0.5))
  assert model.slots.name == "visionzip"


def test_missing_and_surplus_tensors_are_listed(folder, tmp_path):
  with files.opened(folder / files.SINGLE) as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  del tensors["multi_modal_projector.linear_1.bias"]
  tensors["vision_tower.encoder.layers.0.extra"] = np.zeros(1, np.float32)
  files.save_file(tensors, tmp_path / files.SINGLE, metadata={"format": "pt"})
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  with pytest.raises(interop.CheckpointError) as found:
    interop.load(tmp_path)
  for part in ("2 tensors", "missing: multi_modal_projector.linear_1.bias",
               "extra: vision_tower.encoder.layers.0.extra"):
    assert part in str(found.value)
