"""Flax backbones with slots. Nothing is patched: a model is built with them."""

from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.dense_vit import DenseViT
from tokjax.models.dense_vit import DenseViTConfig
from tokjax.models.generation import Generator
from tokjax.models.rotary import Rotary
from tokjax.models.sampling import Sampler
from tokjax.models.speculative import Speculative
from tokjax.models.vit import ViT
from tokjax.models.vit import ViTConfig
from tokjax.models.vlm import VisionLanguage
from tokjax.models.vlm_config import VisionLanguageConfig
from tokjax.models.vlm_generation import VisionLanguageGenerator

__all__ = [
  "Decoder",
  "DecoderConfig",
  "DenseViT",
  "DenseViTConfig",
  "Generator",
  "Rotary",
  "Sampler",
  "Speculative",
  "ViT",
  "ViTConfig",
  "VisionLanguage",
  "VisionLanguageConfig",
  "VisionLanguageGenerator",
]
