"""Published language models that tests write: Qwen2, random parameters."""

import pathlib
from typing import Any

from tests.decoder.models import params_of
from tokjax.interop import convert, files
from tokjax.interop.architectures_language import LANGUAGE

QWEN = {
  "architectures": ["Qwen2ForCausalLM"],
  "vocab_size": 40,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 64,
  "rope_theta": 1000.0,
  "eos_token_id": [5, 7],
}


def write(folder: pathlib.Path, **changes: Any) -> None:
  """config.json, with changes, and the tensors in shards."""
  whole, language = {**QWEN, **changes}, LANGUAGE["Qwen2ForCausalLM"]
  config = language.read(whole)
  found = convert.entries(language.table(config), config, "model.")
  tensors = convert.write_tensors(params_of(config), found, config, None)
  files.write_json(folder / "config.json", whole)
  files.write_tensors(folder, tensors, shard_bytes=4000)
