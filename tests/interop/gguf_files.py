"""GGUF files that tests write, as llama.cpp's converter would.

What the converter does is written out here once more, so that a fault in ours
does not cancel.
"""

import numpy as np
import pytest

gguf = pytest.importorskip(
  "gguf", reason="GGUF is tested where the package gguf is installed"
)

# Ours, and theirs within a block or outside of one.
BLOCK = {
  "norm1/scale": "attn_norm.weight",
  "norm2/scale": "ffn_norm.weight",
  "post_norm1/scale": "post_attention_norm.weight",
  "post_norm2/scale": "post_ffw_norm.weight",
  "attention/query_norm/scale": "attn_q_norm.weight",
  "attention/key_norm/scale": "attn_k_norm.weight",
}
for ours, theirs in {
  "attention/query": "attn_q",
  "attention/key": "attn_k",
  "attention/value": "attn_v",
  "attention/out": "attn_output",
  "mlp/gate": "ffn_gate",
  "mlp/up": "ffn_up",
  "mlp/down": "ffn_down",
}.items():
  BLOCK[f"{ours}/kernel"] = f"{theirs}.weight"
  BLOCK[f"{ours}/bias"] = f"{theirs}.bias"
OUTSIDE = {
  "embed/embedding": "token_embd.weight",
  "norm/scale": "output_norm.weight",
  "head/kernel": "output.weight",
}


def write(path, architecture, metadata, tensors, kinds=None):
  """A file; keys without a dot get the architecture's name in front.

  Args:
    path: of the file.
    architecture: its name.
    metadata: by key; the type follows from the Python type.
    tensors: float32, by name.
    kinds: the type of a tensor's blocks by its name; others are F32.
  """
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in metadata.items():
    add = {
      bool: writer.add_bool,
      int: writer.add_uint32,
      float: writer.add_float32,
      str: writer.add_string,
      list: writer.add_array,
    }[type(value)]
    add(key, value)
  for name, value in tensors.items():
    kind = (kinds or {}).get(name)
    if kind is None:
      writer.add_tensor(name, np.ascontiguousarray(value))
    else:
      packed = gguf.quantize(np.ascontiguousarray(value), kind)
      writer.add_tensor(name, packed, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def permuted(weight, heads):
  """Pairs (i, i + k/2) of each head as neighbours."""
  k = len(weight) // heads
  order = np.arange(k).reshape(2, k // 2).T.reshape(-1)
  rows = (np.arange(heads)[:, None] * k + order).reshape(-1)
  return weight[rows]


def tensors_of(flat, architecture, heads, kv_heads):
  """Tensors of a file from our parameters by name."""
  found = {}
  for name, value in flat.items():
    value = np.asarray(value, np.float32)
    block, _, within = name.partition("/")
    if name in OUTSIDE:
      theirs = OUTSIDE[name]
    else:
      theirs = f"blk.{block.removeprefix('block_')}.{BLOCK[within]}"
    if name.endswith("kernel"):
      value = value.T
    if architecture == "llama" and ".attn_q." in theirs:
      value = permuted(value, heads)
    if architecture == "llama" and ".attn_k." in theirs:
      value = permuted(value, kv_heads)
    if architecture.startswith("gemma") and theirs.endswith("norm.weight"):
      value = value + 1
    found[theirs] = value
  return found


def metadata_of(config, architecture, **more):
  """Metadata of a configuration of ours; `more` is added, None left out."""
  stated = {
    "block_count": config.depth,
    "context_length": config.length,
    "embedding_length": config.width,
    "feed_forward_length": config.mlp_dim,
    "attention.head_count": config.heads,
    "attention.head_count_kv": config.kv_heads,
    "attention.key_length": config.features,
    "attention.value_length": config.features,
    "attention.layer_norm_rms_epsilon": config.epsilon,
    "rope.dimension_count": config.features,
    "rope.freq_base": config.rotary.base,
    **more,
  }
  return {
    f"{architecture}.{key}": value
    for key, value in stated.items()
    if value is not None
  }
