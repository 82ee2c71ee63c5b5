"""GGUF files that are damaged, foreign or made to harm: one clear error."""

import os
import struct

import numpy as np
import pytest
from flax import traverse_util

from tests.decoder.models import config, params_of
from tests.interop import gguf_files
from tokjax import interop

ERRORS = (interop.ConfigError, interop.CheckpointError)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Bytes of a file that can be read."""
  path = tmp_path_factory.mktemp("gguf") / "model.gguf"
  write(path)
  interop.load(path)
  return path.read_bytes()


def write(path, changes=(), tensors=(), architecture="llama"):
  made = config()
  flat = traverse_util.flatten_dict(params_of(made), sep="/")
  metadata = gguf_files.metadata_of(made, "llama", **dict(changes))
  found = gguf_files.tensors_of(flat, "llama", made.heads, made.kv_heads)
  found = {k: v for k, v in {**found, **dict(tensors)}.items() if v is not None}
  return gguf_files.write(path, architecture, metadata, found)


def fault(path):
  """The one error's message."""
  with pytest.raises(ERRORS) as error:
    interop.load(path)
  return str(error.value)


def test_every_truncation_is_an_error(whole, tmp_path):
  path = tmp_path / "cut.gguf"
  for size in {0, 3, 4, 8, 15, *range(24, len(whole), 211), len(whole) - 1}:
    path.write_bytes(whole[:size])
    assert f"cut.gguf: {size} bytes, truncated, damaged or no GGUF" in fault(
      path
    )


@pytest.mark.parametrize(
  "place, code, value, message",
  [
    (0, "4s", b"PK\3\4", "it begins with b'PK"),
    (4, "<I", 1, "version 1"),
    (4, ">I", 3, "version 50331648, or big-endian"),
    (8, "<Q", 2**60, f"a list of {2**60} tensors needs"),
    (16, "<Q", 2**62, f"metadata of {2**62} values needs"),
    (24, "<Q", 2**63, "a key needs"),
  ],
)
def test_a_header_that_lies(whole, tmp_path, place, code, value, message):
  data = bytearray(whole)
  struct.pack_into(code, data, place, value)
  (tmp_path / "model.gguf").write_bytes(data)
  assert message in fault(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", [4, 8, 9, 77])
def test_a_list_that_claims_to_be_long(tmp_path, kind):
  key = b"general.list"
  data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
  data += struct.pack("<Q", len(key)) + key
  data += struct.pack("<IIQ", 9, kind, 2**60) + bytes(64)
  (tmp_path / "model.gguf").write_bytes(data)
  assert "general.list" in fault(tmp_path / "model.gguf")


def test_flipped_bytes_never_end_in_another_error(whole, tmp_path):
  """Any byte of the header, at random: read, or refused with a message."""
  rng = np.random.default_rng(0)
  path, refused = tmp_path / "model.gguf", 0
  for _ in range(150):
    data = bytearray(whole)
    for place in rng.integers(0, 2600, rng.integers(1, 4)):
      data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
      interop.config_from(path)
    except ValueError as error:
      assert str(path) in str(error) or "rope" in str(error)
      refused += 1
  assert refused > 75


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"block_count": None}, "has no 'llama.block_count'"),
    ({"block_count": 10**6}, "llama.block_count=1000000: must be 10000 or"),
    ({"block_count": 9000}, "llama.block_count=9000, but there are"),
    ({"embedding_length": 2**31 - 1}, "llama.embedding_length asks for"),
    ({"embedding_length": "wide"}, "llama.embedding_length='wide'"),
    ({"attention.head_count": 0}, "llama.attention.head_count=0"),
    ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon=nan"),
    ({"rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
    ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type='longrope'"),
    ({"rope.scaling.type": "yarn"}, "has no 'llama.rope.scaling.factor'"),
    ({"expert_count": 8}, "llama.expert_count=8 is not supported"),
    ({"attention.causal": False}, "llama.attention.causal is false"),
    ({"vocab_size": 41}, "llama.vocab_size=41: token_embd.weight has 40 rows"),
  ],
)
def test_metadata_that_contradicts_itself(tmp_path, changes, message):
  assert message in fault(write(tmp_path / "model.gguf", changes))


NAN = np.full((16,), np.nan, np.float32)


@pytest.mark.parametrize(
  "tensors, message",
  [
    ({"output_norm.weight": NAN}, "not finite: output_norm.weight"),
    ({"output_norm.weight": None}, "missing: output_norm.weight [16]"),
    ({"output_norm.weight": NAN[:8]}, "misshapen: output_norm.weight [8]"),
    ({"blk.0.other.weight": NAN}, "extra: blk.0.other.weight"),
    ({"token_embd.weight": None}, "has no tensor token_embd.weight"),
    ({"rope_freqs.weight": NAN[:4]}, "rope_freqs.weight is not Llama 3's rule"),
    ({"output_norm.weight": np.ones(16, np.int8)}, "output_norm.weight is I8"),
    ({"rope_freqs.weight": np.ones(4, np.int8)}, "rope_freqs.weight is I8"),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, tensors, message):
  assert message in fault(write(tmp_path / "model.gguf", tensors=tensors))


def test_foreign_files(tmp_path):
  path = write(tmp_path / "model.gguf", architecture="mamba")
  assert "general.architecture='mamba': must be one of llama" in fault(path)
  made = gguf_files.write(tmp_path / "b.gguf", "llama", {"split.count": 3}, {})
  assert "the model is in 3 files" in fault(made)
  os.mkfifo(tmp_path / "pipe.gguf")
  assert "no regular file" in fault(tmp_path / "pipe.gguf")
  with pytest.raises(FileNotFoundError, match="nor a file that ends in"):
    interop.load(tmp_path / "absent.gguf")


def test_a_link_that_the_user_names_is_followed(whole, tmp_path):
  (tmp_path / "far").mkdir()
  (tmp_path / "far" / "blob").write_bytes(whole)
  (tmp_path / "near").mkdir()
  link = tmp_path / "near" / "model.gguf"
  link.symlink_to(tmp_path / "far" / "blob")
  assert interop.config_from(link).depth == 2
