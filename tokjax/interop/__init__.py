"""Pretrained weights in and out, as tables of names and shapes."""

from tokjax.interop.fields import ConfigError
from tokjax.interop.learned_parts import recipe_of
from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.pretrained import config_from
from tokjax.interop.pretrained import inputs_of
from tokjax.interop.pretrained import labels_of
from tokjax.interop.pretrained import layouts
from tokjax.interop.pretrained import load
from tokjax.interop.tensors import CheckpointError
from tokjax.interop.tokenizer import Bytes
from tokjax.interop.tokenizer import Tokenizer
from tokjax.interop.writing import layout_for
from tokjax.interop.writing import save

__all__ = [
  "Bytes",
  "CheckpointError",
  "ConfigError",
  "Preprocessing",
  "Tokenizer",
  "config_from",
  "inputs_of",
  "labels_of",
  "layout_for",
  "layouts",
  "load",
  "recipe_of",
  "save",
]
