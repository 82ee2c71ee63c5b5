"""LLaVA equals `transformers` on random weights, in float32."""

import jax
import numpy as np
import pytest

from tests.interop.language_references import torch, transformers
from tokjax import interop
from tokjax.models import VisionLanguageGenerator

# The requirement is 1e-4.
BOUND = 2e-5
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
    vision="siglip", vision_feature_layer=-1,
    vision_feature_select_strategy="full", multimodal_projector_bias=False,
  ),
  "clip-full": dict(
    vision_feature_layer=1, vision_feature_select_strategy="full",
    projector_hidden_act="gelu_pytorch_tanh",
  ),
}  # fmt: skip


def make(vision: str = "clip", **options):
  """A reference model with every parameter drawn."""
  kinds = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}
  tower = getattr(transformers, kinds[vision])(**VISION)
  config = transformers.LlavaConfig(
    vision_config=tower, text_config=transformers.LlamaConfig(**TEXT),
    image_token_index=IMAGE, image_seq_length=PATCHES, **options,
  )  # fmt: skip
  config._attn_implementation = "eager"
  model = transformers.LlavaForConditionalGeneration(config)
  noise = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      spread = value.dim() > 1 and value.shape[-1] ** -0.5
      drawn = torch.randn(value.shape, generator=noise) * (spread or 0.3)
      value.copy_(drawn + ("norm" in name and "weight" in name))
  return model.eval()


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
  going = made.prefill(PROMPTS, own)
  found = [np.asarray(going.logits)]
  for token in NEXT:
    going = made.step(going, token.astype(np.int32))
    found.append(np.asarray(going.logits))
  found = np.stack(found, axis=1)
  for i, prompt in enumerate(PROMPTS):
    count = made.image_tokens
    expected = their_logits(theirs, (prompt, NEXT[:, i]), own[i], count)
    assert np.abs(expected).max() > 0.5
    worst = np.abs(found[i] - expected).max()
    record_property("max_abs_difference", float(worst))
    assert worst < BOUND, i


def test_a_whole_sequence_equals_the_reference(pair):
  theirs, model, params = pair
  if model.config.pass_class or not model.config.vision.kinds:
    pytest.skip("one encoder is enough")
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
