"""GGUF files of reference models: logits and ids equal `transformers`."""

import unicodedata

import jax
import numpy as np
import pytest

from tests.interop import gguf_files
from tests.interop.language_references import make, torch, transformers
from tests.interop.test_gguf_tokenizer import (
  SENTENCES,
  STEPS,
  TEXTS,
  byte_level_file,
  read,
  sentencepiece_file,
  trained,
)
from tokjax import interop

BOUND = 2e-5
LAYER = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}
TWO = {"post_attention_layernorm": "ffn_norm"}
FOUR = {
  "post_attention_layernorm": "post_attention_norm",
  "pre_feedforward_layernorm": "ffn_norm",
  "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
}
LLAMA3 = dict(factor=8.0, low=1.0, high=4.0, length=16, base=500.0)
YARN = {
  "rope.scaling.type": "yarn",
  "rope.scaling.factor": 4.0,
  "rope.scaling.original_context_length": 16,
}
# Reference, architecture, and what the converter states beyond the sizes.
MODELS = {
  "llama2-biased": ("llama", {}),
  "llama3": ("llama", {}),
  "mistral": ("llama", {"attention.sliding_window": 4}),
  "qwen2-yarn": ("qwen2", YARN),
  "qwen3": ("qwen3", {}),
  "gemma2": (
    "gemma2",
    {
      "attention.sliding_window": 4,
      "attention.scale": 20.0**-0.5,
      "attn_logit_softcapping": 3.0,
      "final_logit_softcapping": 2.0,
    },
  ),
  "gemma3": (
    "gemma3",
    {
      "attention.sliding_window": 4,
      "attention.sliding_window_pattern": [True, False, True],
      "attention.scale": 20.0**-0.5,
      "rope.scaling.type": "linear",
      "rope.scaling.factor": 4.0,
      "rope.freq_base_swa": 30.0,
    },
  ),
}  # fmt: skip


def llama3_factors(features):
  """As llama.cpp's converter computes them."""
  out = []
  for i in range(0, features, 2):
    turns = LLAMA3["length"] / (2 * np.pi * LLAMA3["base"] ** (i / features))
    if turns > LLAMA3["high"]:
      out.append(1.0)
    elif turns < LLAMA3["low"]:
      out.append(LLAMA3["factor"])
    else:
      smooth = (turns - LLAMA3["low"]) / (LLAMA3["high"] - LLAMA3["low"])
      out.append(1 / ((1 - smooth) / LLAMA3["factor"] + smooth))
  return np.array(out, np.float32)


def converted(theirs, architecture):
  """Names and values of a file from a reference model's state."""
  cfg, found = theirs.config, {}
  table = {**LAYER, **(FOUR if architecture.startswith("gemma") else TWO)}
  for name, value in theirs.state_dict().items():
    stem, _, kind = name.rpartition(".")
    value = value.numpy()
    if stem in OUTSIDE:
      if stem == "lm_head" and cfg.tie_word_embeddings:
        continue
      place = OUTSIDE[stem]
    else:
      block, _, within = stem.removeprefix("model.layers.").partition(".")
      place = f"blk.{block}.{table[within]}"
    if architecture == "llama" and place.endswith("attn_q"):
      value = gguf_files.permuted(value, cfg.num_attention_heads)
    if architecture == "llama" and place.endswith("attn_k"):
      value = gguf_files.permuted(value, cfg.num_key_value_heads)
    if architecture.startswith("gemma") and place.endswith("norm"):
      value = value + 1
    found[f"{place}.{kind}"] = value
  return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name, tmp_path):
  theirs, (architecture, more) = make(name), MODELS[name]
  cfg, path = theirs.config, tmp_path / "model.gguf"
  heads = cfg.num_attention_heads
  features = getattr(cfg, "head_dim", None) or cfg.hidden_size // heads
  rope = cfg.rope_parameters
  stated = {
    "block_count": cfg.num_hidden_layers,
    "context_length": cfg.max_position_embeddings,
    "embedding_length": cfg.hidden_size,
    "feed_forward_length": cfg.intermediate_size,
    "attention.head_count": heads,
    "attention.head_count_kv": cfg.num_key_value_heads,
    "attention.key_length": features,
    "attention.value_length": features,
    "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
    "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    **more,
  }
  tensors = converted(theirs, architecture)
  if name == "llama3":
    tensors["rope_freqs.weight"] = llama3_factors(features)
  metadata = {f"{architecture}.{k}": v for k, v in stated.items()}
  gguf_files.write(path, architecture, metadata, tensors)
  if name != "mistral":  # its reader has no names of tensors for these
    same_in_transformers(path, theirs, architecture)
  model, params, _ = interop.load(path)
  tokens = np.random.default_rng(1).integers(3, 50, (1, 12)).astype(np.int32)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens).long()).logits.numpy()
  ours = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])(params, tokens)
  assert np.abs(np.asarray(ours) - expected).max() < BOUND


def same_in_transformers(path, theirs, architecture):
  """Its own reader finds the model in the file: it is written as it should."""
  utils = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
  if not hasattr(utils, "load_gguf_checkpoint"):
    return
  read = utils.load_gguf_checkpoint(
    str(path), return_tensors=True, model_to_load=theirs
  )
  assert read["config"]["model_type"].startswith(architecture)
  state = theirs.state_dict()
  assert set(read["tensors"]) <= set(state)
  for key, value in read["tensors"].items():
    assert torch.allclose(value, state[key], atol=3e-7), key


@pytest.mark.parametrize("pre", [*STEPS, "qwen2", "tekken"])
def test_byte_level_ids_equal_the_reference(pre, tmp_path):
  made = trained(STEPS.get(pre, STEPS["gpt-2"]))
  path = byte_level_file(tmp_path / "t.gguf", made, pre)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(
    tmp_path, gguf_file="t.gguf"
  )
  ours = read(path)
  front = len(ours.encode(""))
  for text in (*TEXTS, "<|im_start|>user 12<|im_end|>"):
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    if pre == "qwen2":
      # The published tokenizer composes characters, its file does not say so.
      text = unicodedata.normalize("NFD", text)
      composed = unicodedata.normalize("NFC", text)
      expected = theirs(composed, add_special_tokens=False)["input_ids"]
    if pre == "smollm":
      # No merge has a digit in it, so the reference needs no rule for them.
      expected = made.encode(text).ids
    assert ours.encode(text)[front:] == expected


def test_sentencepiece_ids_equal_the_reference(tmp_path):
  path = sentencepiece_file(tmp_path / "t.gguf")
  theirs = transformers.LlamaTokenizerFast.from_pretrained(
    tmp_path, gguf_file="t.gguf"
  )
  ours = read(path)
  for text in (*SENTENCES, "<s>an</s> the"):
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text)[1:] == expected
