"""GGUF files of every architecture: the parameters that were written."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.decoder.models import config, params_of
from tests.interop import gguf_files
from tests.interop.gguf_files import gguf
from tokjax import interop
from tokjax.interop import gguf_families
from tokjax.interop.gguf_file import GgufFile
from tokjax.models import Decoder
from tokjax.models.rotary import Rotary

GEMMA = dict(
  post_norms=True,
  norm_from_one=True,
  embed_scale=True,
  activation="gelu_tanh",
  window=4,
)
LLAMA3 = Rotary(500.0, "llama3", 8.0, 16)
YARN = Rotary(1000.0, "yarn", 4.0, 16, fast=32.0)
YARN_KEYS = {
  "rope.scaling.type": "yarn",
  "rope.scaling.factor": 4.0,
  "rope.scaling.original_context_length": 16,
}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}


def factors(rotary, features=8):
  plain = np.asarray(Rotary(rotary.base).frequencies(features))
  return plain / np.asarray(rotary.frequencies(features))


# Architecture, changes of the configuration, more metadata, more tensors.
MODELS = {
  "llama": ("llama", dict(tied=False), {}, {}),
  "llama-biased": (
    "llama", dict(qkv_bias=True, out_bias=True, mlp_bias=True), {}, {},
  ),
  "llama3": (
    "llama", dict(rotary=LLAMA3), {},
    {"rope_freqs.weight": factors(LLAMA3)},
  ),
  "mistral": (
    "llama", dict(layers=("sliding",), window=4),
    {"attention.sliding_window": 4}, {},
  ),
  "qwen2": ("qwen2", dict(qkv_bias=True, rotary=YARN), YARN_KEYS, {}),
  "qwen2-yarn-scaled": (
    "qwen2",
    dict(rotary=dataclasses.replace(
      YARN, attention_factor=2 * (0.1 * np.log(4.0) + 1), fast=16.0
    )),
    {
      **YARN_KEYS,
      "rope.scaling.attn_factor": 2.0,
      "rope.scaling.yarn_beta_fast": 16.0,
    }, {},
  ),
  "qwen3": (
    "qwen3", dict(qk_norm=True, rotary=Rotary(scaling="linear", factor=8.0)),
    LINEAR, {},
  ),
  "gemma2": (
    "gemma2",
    dict(
      **GEMMA, layers=("sliding", "full"), attention_softcap=50.0,
      logit_softcap=2.0, query_scale=20.0,
    ),
    {
      "attention.sliding_window": 4,
      "final_logit_softcapping": 2.0,
      "attention.scale": 20.0**-0.5,
    }, {},
  ),
  "gemma3": (
    "gemma3",
    dict(
      **GEMMA, layers=("sliding",) * 2, qk_norm=True,
      local_rotary=Rotary(30.0),
    ),
    {
      "attention.sliding_window": 4,
      "attention.sliding_window_pattern": [True, True],
      "rope.freq_base_swa": 30.0,
    }, {},
  ),
}  # fmt: skip


def write(path, name):
  architecture, changes, more, tensors = MODELS[name]
  made = config(**changes)
  flat = traverse_util.flatten_dict(params_of(made), sep="/")
  tensors = {
    **gguf_files.tensors_of(flat, architecture, made.heads, made.kv_heads),
    **{key: value.astype(np.float32) for key, value in tensors.items()},
  }
  metadata = gguf_files.metadata_of(made, architecture, **more)
  gguf_files.write(path, architecture, metadata, tensors)
  return made, flat


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_read(name, tmp_path):
  made, flat = write(tmp_path / "model.gguf", name)
  model, params, tokenizer = interop.load(tmp_path / "model.gguf")
  assert tokenizer is None and isinstance(model, Decoder)
  scale = model.config.query_scale
  if made.query_scale is not None:
    assert scale == pytest.approx(made.query_scale, rel=1e-6)
    scale = made.query_scale
  rotary = model.config.rotary
  if made.rotary.attention_factor is not None:
    assert rotary.attention_factor == pytest.approx(rotary.attention_factor)
    rotary = made.rotary
  if made.rotary.scaling == "llama3":
    assert rotary.factor == pytest.approx(8.0, rel=1e-6)
    rotary = dataclasses.replace(rotary, factor=8.0)
  same = dataclasses.replace(model.config, query_scale=scale, rotary=rotary)
  assert same == made
  assert interop.config_from(tmp_path / "model.gguf") == model.config
  ours = traverse_util.flatten_dict(params, sep="/")
  assert ours.keys() == flat.keys()
  for key, value in flat.items():
    # 1 was added to Gemma's norms, which costs their last bits.
    np.testing.assert_allclose(
      ours[key], value, rtol=0, atol=2e-7 * made.norm_from_one, err_msg=key
    )


def test_a_model_of_blocks(tmp_path):
  """Q8_0 is near; other types equal the package's values for the same blocks.

  Rows are reordered by head after their blocks were read.
  """
  made = config(width=32, mlp_dim=64, head_dim=8)
  flat = traverse_util.flatten_dict(params_of(made), sep="/")
  tensors = gguf_files.tensors_of(flat, "llama", made.heads, made.kv_heads)
  kind = gguf.GGMLQuantizationType.Q8_0
  kinds = {name: kind for name, value in tensors.items() if value.ndim > 1}
  path = tmp_path / "model.gguf"
  metadata = gguf_files.metadata_of(made, "llama")
  gguf_files.write(path, "llama", metadata, tensors, kinds)
  model, params, _ = interop.load(path)
  ours = traverse_util.flatten_dict(params, sep="/")
  for key, value in flat.items():
    worst = np.abs(value).max() / 127
    np.testing.assert_allclose(ours[key], value, rtol=0, atol=worst)
  half = interop.load(path, param_dtype="bfloat16")[1]
  assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}


def test_every_type_that_the_package_reads(tmp_path):
  """Random blocks, all types at once: values and their dtype."""
  rng = np.random.default_rng(0)
  blocks, unread = {}, []
  writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
  for kind in gguf.GGMLQuantizationType:
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 60, (3, 2 * size), np.uint8)
    try:
      with np.errstate(all="ignore"):
        blocks[kind.name] = gguf.dequantize(raw, kind)
    except NotImplementedError:
      unread.append(kind.name)
    writer.add_tensor(kind.name, raw, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  file = GgufFile(tmp_path / "all.gguf")
  assert len(blocks) > 20 and {"Q8_K", "I8"} <= set(unread)
  found = file.read(list(blocks))
  for name, expected in blocks.items():
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(name, "float32")
    assert file.headers[name].dtype == found[name].dtype.name == dtype
    assert file.headers[name].shape == expected.shape
    np.testing.assert_array_equal(found[name].astype(np.float32), expected)
  for name in set(unread) - {"F64"}:
    assert file.headers[name].dtype == name


def test_heads_may_be_listed_and_gemma_has_its_largest_model():
  """`head_count_kv` per layer; 27 billion parameters scale by width."""
  family = gguf_families.ARCHITECTURES["gemma3"]
  part = {
    "gemma3.attention.head_count_kv": np.array([2, 2]),
    "gemma3.block_count": 62,
    "gemma3.embedding_length": 5376,
    "gemma3.attention.head_count": 32,
  }
  assert family._kv_heads(part, "gemma3.attention.head_count_kv") == 2
  assert family._query_scale(part, "gemma3.attention.scale") == 168
  assert family._query_scale({**part, "gemma3.block_count": 34}, "x") is None
  part["gemma3.attention.head_count_kv"] = np.array([2, 3])
  with pytest.raises(ValueError, match="the same for all layers"):
    family._kv_heads(part, "gemma3.attention.head_count_kv")
