"""Small random models of the reference implementation, one for each class."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

torch = pytest.importorskip(
  "torch", reason="parity is measured where torch is installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured where transformers is installed"
)

IMAGE, PATCH = 32, 8
SIZE = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=48,
)
SHAPE = dict(**SIZE, image_size=IMAGE, patch_size=PATCH)
DINO = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  image_size=IMAGE,
  patch_size=PATCH,
  mlp_ratio=2,
)
TEXT = dict(**SIZE, vocab_size=20, bos_token_id=1, eos_token_id=2)


class Reference(NamedTuple):
  """How a class is made and run.

  Attributes:
    make: the model.
    output: names the reference's output that ours equals.
    features: names the reference's tokens that `out["features"]` equals.
    resize: arguments of the forward pass at another image size.
  """

  make: Callable
  output: str = "logits"
  features: str | None = None
  resize: dict | None = None


INTERPOLATE = dict(interpolate_pos_encoding=True)


def vision(name, config, output, **options):
  """A vision tower with its own configuration class."""

  def make():
    values = {**SHAPE, **options}
    return getattr(transformers, name)(getattr(transformers, config)(**values))

  return Reference(make, output, "last_hidden_state", INTERPOLATE)


def classifier(name, config, **options):
  def make():
    values = {**SHAPE, "num_labels": 5, **options}
    return getattr(transformers, name)(getattr(transformers, config)(**values))

  return Reference(make, resize=INTERPOLATE)


def dino(name, config):
  def make():
    return getattr(transformers, name)(getattr(transformers, config)(**DINO))

  return Reference(make, "pooler_output", "last_hidden_state", {})


REFERENCES = {
  "vit": classifier("ViTForImageClassification", "ViTConfig"),
  "vit-tanh-no-bias": classifier(
    "ViTForImageClassification",
    "ViTConfig",
    qkv_bias=False,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-3,
  ),
  "vit-rectangle": classifier(
    "ViTForImageClassification", "ViTConfig", image_size=(24, 40)
  ),
  "vit-model": vision("ViTModel", "ViTConfig", "pooler_output"),
  "deit": classifier("DeiTForImageClassification", "DeiTConfig"),
  "deit-teacher": classifier(
    "DeiTForImageClassificationWithTeacher", "DeiTConfig"
  ),
  "deit-model": vision(
    "DeiTModel", "DeiTConfig", "pooler_output", pooler_output_size=24
  ),
  "clip": vision("CLIPVisionModel", "CLIPVisionConfig", "pooler_output"),
  "clip-gelu": vision(
    "CLIPVisionModel", "CLIPVisionConfig", "pooler_output", hidden_act="gelu"
  ),
  "clip-projection": vision(
    "CLIPVisionModelWithProjection",
    "CLIPVisionConfig",
    "image_embeds",
    projection_dim=16,
  ),
  "siglip": vision("SiglipVisionModel", "SiglipVisionConfig", "pooler_output"),
  "siglip-no-head": vision(
    "SiglipVisionModel",
    "SiglipVisionConfig",
    "last_hidden_state",
    vision_use_head=False,
  ),
  "dinov2": dino("Dinov2Model", "Dinov2Config"),
  "dinov2-registers": dino(
    "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"
  ),
}


def randomise(model, seed=0):
  """Draws every parameter, so that none is at a value that hides errors."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      spread = value.dim() > 1 and value.shape[-1] ** -0.5
      scale = spread or 0.3
      value.copy_(noise * scale + ("norm" in name and "weight" in name))
  return model.eval()


def composite(name):
  """A model with a text tower, of which ours is the vision tower."""
  config = getattr(transformers, name.replace("Model", "Config"))
  vision_config = dict(SHAPE)
  if name == "Siglip2Model":
    vision_config = dict(**SIZE, patch_size=PATCH, num_patches=16)
  extra = {"projection_dim": 16} if name == "CLIPModel" else {}
  whole = config(vision_config=vision_config, text_config=TEXT, **extra)
  return getattr(transformers, name)(whole)


def as_torch(images):
  """Images `[b, h, w, c]` as the reference takes them."""
  return torch.tensor(images).permute(0, 3, 1, 2).contiguous()
