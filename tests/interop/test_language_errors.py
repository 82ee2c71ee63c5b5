"""Language checkpoints: both spellings of config.json, and what is refused."""

import json
import re

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.decoder.models import params_of
from tests.interop import checkpoints
from tests.interop.checkpoints import QWEN
from tokjax import interop
from tokjax.interop import files
from tokjax.interop.architectures_language import LANGUAGE
from tokjax.models import Decoder, Rotary


@pytest.fixture
def folder(tmp_path):
  """A checkpoint in shards, written from random parameters."""
  checkpoints.write(tmp_path)
  return tmp_path


def rewrite(folder, change):
  """Changes the tensors of the first shard."""
  path = sorted(folder.glob("model-*.safetensors"))[0]
  with files.opened(path) as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  change(tensors)
  files.save_file(tensors, path, metadata={"format": "pt"})
  return sorted(tensors)


def test_reads_what_was_written(folder):
  model, params, tokenizer = interop.load(folder)
  assert model.config == interop.config_from(folder)
  assert model.config.qkv_bias and not model.config.tied
  jax.tree.map(np.testing.assert_array_equal, params, params_of(model.config))
  assert tokenizer is None


def test_all_that_is_wrong_is_in_one_message(folder):
  def change(tensors):
    names = sorted(tensors)
    tensors.pop(names[0])
    tensors[names[1]] = tensors[names[1]][:1]
    tensors["model.layers.0.surplus"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(
      2, np.float32
    )

  rewrite(folder, change)
  with pytest.raises(interop.CheckpointError) as error:
    interop.load(folder)
  message = str(error.value)
  assert "3 tensors do not fit" in message
  for word in ("missing: ", "misshapen: ", "extra: model.layers.0.surplus"):
    assert word in message


def test_a_truncated_shard_names_the_file(folder):
  path = sorted(folder.glob("model-*.safetensors"))[1]
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(interop.CheckpointError, match="truncated or damaged"):
    interop.load(folder)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=re.escape(path.name)):
    interop.load(folder)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"architectures": ["GPT2LMHeadModel"]}, "no language model.*Llama"),
    ({"architectures": []}, "no architectures"),
    ({"hidden_act": "relu"}, "hidden_act.*'relu'"),
    (
      {"rope_scaling": {"type": "longrope", "factor": 4.0}},
      "'longrope': must be one of",
    ),
    ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
    ({"vocab_size": None}, "vocab_size"),
  ],
)
def test_what_cannot_be_followed(folder, changes, message):
  whole = {**QWEN, **changes}
  whole = {name: value for name, value in whole.items() if value is not None}
  files.write_json(folder / "config.json", whole)
  with pytest.raises(ValueError, match=message):
    interop.load(folder)


def test_one_load_for_every_kind_of_model(folder):
  model, params, _ = interop.load(folder, epsilon=1e-3)
  assert isinstance(model, Decoder)
  assert model.config.epsilon == 1e-3
  assert params["embed"]["embedding"].shape == (40, 16)
  with pytest.raises(TypeError, match="no option 'image_size'.*DecoderConfig"):
    interop.load(folder, image_size=48)
  with pytest.raises(interop.CheckpointError, match="misshapen: embed/embedd"):
    interop.load(folder, vocabulary=50)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {**QWEN, "architectures": ["Gemma3ForCausalLM"], "head_dim": 8}


@pytest.mark.parametrize(
  "name, published, written",
  [
    (
      "LlamaForCausalLM",
      {
        "rope_theta": 500000.0,
        "rope_scaling": {
          **LLAMA3,
          "original_max_position_embeddings": 8192,
          "rope_type": "llama3",
        },
      },
      {
        "rope_theta": None,
        "rope_parameters": {
          **LLAMA3,
          "original_max_position_embeddings": 8192,
          "rope_type": "llama3",
          "rope_theta": 500000.0,
        },
      },
    ),
    (
      "Gemma3ForCausalLM",
      {
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 2,
        "sliding_window": 9,
      },
      {
        "rope_theta": None,
        "rope_parameters": {
          "full_attention": {
            "factor": 8.0,
            "rope_type": "linear",
            "rope_theta": 1e6,
          },
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
      },
    ),
  ],
)
def test_both_spellings_mean_the_same(name, published, written):
  def read(changes):
    whole = {**QWEN, "hidden_activation": "gelu_pytorch_tanh", **changes}
    whole = {key: value for key, value in whole.items() if value is not None}
    return LANGUAGE[name].read(whole)

  config = read(published)
  assert config == read(written)
  assert config.rotary.scaling != "none"
  if name.startswith("Gemma"):
    assert config.local_rotary == Rotary(10000.0)
    assert config.layers == ("sliding", "full")


def test_the_checkpoints_own_tokenizer(folder):
  made = Tokenizer(models.WordLevel({"a": 3, "b": 4, "[UNK]": 0}, "[UNK]"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.save(str(folder / "tokenizer.json"))
  tokenizer = interop.load(folder)[2]
  assert tokenizer.encode("b a zzz") == [4, 3, 0]
  assert tokenizer.decode([3, 4]) == "a b"
  assert tokenizer.ends == (5, 7)
  files.write_json(folder / "generation_config.json", {"eos_token_id": 9})
  assert interop.load(folder)[2].ends == (9,)
  (folder / "tokenizer.json").write_text(json.dumps({"model": "none"}))
  with pytest.raises(ValueError, match="tokenizer.json: cannot be read"):
    interop.load(folder)
