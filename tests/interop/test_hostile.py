"""Checkpoints that are damaged or made to harm: one clear error, quickly."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.interop import checkpoints
from tests.interop.helpers import config, random_params, stored
from tokjax import interop
from tokjax.interop import files


@pytest.fixture
def language(tmp_path):
  checkpoints.write(tmp_path)
  return tmp_path


@pytest.fixture
def vision(tmp_path):
  interop.save(tmp_path, config(), random_params(config()))
  return tmp_path


def edit(folder, file="config.json", **changes):
  path = folder / file
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def faults(folder):
  """Lines of the one error."""
  with pytest.raises(ValueError) as error:
    interop.load(folder)
  assert type(error.value) in (interop.ConfigError, interop.CheckpointError)
  return str(error.value)


@pytest.mark.parametrize(
  "name",
  ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".x", 3],
)
def test_an_index_names_plain_files_only(language, name):
  outside = language.parent / "outside.safetensors"
  save_file({"model.norm.weight": np.ones(16, np.float32)}, outside)
  index = json.loads((language / files.INDEX).read_text())
  index["weight_map"]["model.norm.weight"] = name
  (language / files.INDEX).write_text(json.dumps(index))
  message = faults(language)
  assert "1 entries of weight_map do not name a file of this folder" in message
  assert "model.norm.weight" in message


@pytest.mark.parametrize("value", [None, [], "a", {}, 3, [["a", "b"]]])
def test_an_index_without_a_map(language, value):
  edit(language, files.INDEX, weight_map=value)
  assert "weight_map=" in faults(language)


def test_links_are_followed_inside_a_hub_cache_only(vision, tmp_path):
  shared = tmp_path / "elsewhere"
  shared.mkdir()
  (vision / files.SINGLE).rename(shared / "weights")
  (vision / files.SINGLE).symlink_to(shared / "weights")
  # `elsewhere` lies in the checkpoint's own folder.
  assert interop.load(vision)[0].config == config()
  repo = tmp_path / "models--owner--name"
  (repo / "blobs").mkdir(parents=True)
  snapshot = repo / "snapshots" / "0123"
  snapshot.mkdir(parents=True)
  (shared / "weights").rename(repo / "blobs" / "weights")
  (snapshot / files.SINGLE).symlink_to("../../blobs/weights")
  (vision / "config.json").rename(snapshot / "config.json")
  assert interop.load(snapshot)[0].config == config()
  loose = tmp_path / "loose"
  loose.mkdir()
  (snapshot / "config.json").rename(loose / "config.json")
  (loose / files.SINGLE).symlink_to(repo / "blobs" / "weights")
  assert "outside of the checkpoint" in faults(loose)


@pytest.mark.parametrize(
  "file", ["config.json", files.SINGLE, "preprocessor_config.json"]
)
def test_pipes_are_not_opened(vision, file):
  (vision / file).unlink(missing_ok=True)
  os.mkfifo(vision / file)
  assert f"{file}: is no regular file" in faults(vision)


HUGE = 10**9


@pytest.mark.parametrize(
  "changes",
  [
    dict(hidden_size=HUGE),
    dict(intermediate_size=HUGE),
    dict(image_size=HUGE),
    dict(hidden_size=HUGE, num_attention_heads=HUGE, intermediate_size=HUGE),
    dict(num_channels=HUGE),
    dict(num_hidden_layers=9000),
    dict(num_hidden_layers=HUGE),
  ],
)
def test_sizes_of_vision_are_compared_before_allocation(vision, changes):
  edit(vision, **changes)
  message = faults(vision)
  for name in changes:
    assert name in message


@pytest.mark.parametrize(
  "changes",
  [
    dict(vocab_size=HUGE),
    dict(head_dim=HUGE),
    dict(hidden_size=HUGE, intermediate_size=HUGE),
    dict(num_hidden_layers=HUGE, use_sliding_window=True),
  ],
)
def test_sizes_of_language_are_compared_before_allocation(language, changes):
  edit(language, **changes)
  # Heads are what `num_attention_heads` and `head_dim` make together.
  names = set(changes) - {"head_dim", "use_sliding_window"}
  message = faults(language)
  assert all(name in message for name in names)


@pytest.mark.parametrize(
  "changes, parts",
  [
    (
      dict(
        rms_norm_eps=-1,
        rope_theta=float("inf"),
        head_dim=0,
        quantization_config={"bits": 4},
        vocab_size="many",
        num_hidden_layers={"a": 1},
        hidden_size=True,
        num_attention_heads=None,
        intermediate_size=2.5,
        tie_word_embeddings="yes",
        hidden_act=["silu"],
      ),
      ["rms_norm_eps=-1", "rope_theta=inf", "head_dim=0", "vocab_size='many'"]
      + ["quantization_config", "num_hidden_layers={'a': 1}"]
      + ["hidden_size=True", "num_attention_heads=None"]
      + ["intermediate_size=2.5", "tie_word_embeddings='yes'"]
      + ["hidden_act=['silu']"],
    ),
    (
      dict(
        rope_scaling=dict(
          rope_type="llama3",
          factor="8",
          low_freq_factor=None,
          high_freq_factor=float("nan"),
          original_max_position_embeddings=-4,
        )
      ),
      ["factor='8'", "low_freq_factor=None", "high_freq_factor=nan"]
      + ["original_max_position_embeddings=-4"],
    ),
    (
      dict(rope_scaling=dict(rope_type="yarn", factor=0.5, beta_slow=[])),
      ["beta_slow=[]"],
    ),
    (dict(rope_scaling=dict(rope_type="yarn", factor=0.5)), ["factor=0.5"]),
    (dict(rope_scaling="yarn"), ["rope_scaling='yarn'"]),
    (dict(rope_scaling={"type": ["yarn"]}), ["type=['yarn']"]),
    (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    (dict(layer_types=[["a"]]), ["layer_types=[['a']]"]),
    (dict(layer_types=["full_attention"]), ["1 entries for 2 layers"]),
    (dict(architectures="Qwen2ForCausalLM"), ["architectures='Qwen2"]),
    (dict(architectures=[["Qwen2ForCausalLM"]]), ["architectures=[['Qwen2"]),
  ],
)
def test_every_fault_of_a_language_config_is_in_one_error(
  language, changes, parts
):
  edit(language, **changes)
  message = faults(language)
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  "changes, parts",
  [
    (
      dict(
        layer_norm_eps=float("nan"),
        patch_size=0,
        num_channels="3",
        qkv_bias=1,
        image_size=[32, "32"],
        hidden_act=None,
        id2label=[1, 2],
        quantization_config={"bits": 8},
      ),
      ["layer_norm_eps=nan", "patch_size=0", "num_channels='3'", "qkv_bias=1"]
      + ["image_size=[32, '32']", "hidden_act=None", "id2label=[1, 2]"]
      + ["quantization_config"],
    ),
    (dict(hidden_size=33, image_size=36), ["width=33", "image_size=36"]),
    (dict(vision_config=[]), ["vision_config=[]"]),
  ],
)
def test_every_fault_of_a_vision_config_is_in_one_error(vision, changes, parts):
  edit(vision, **changes)
  message = faults(vision)
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  "changes, parts",
  [
    (
      dict(
        image_mean=["a"],
        image_std=[0.5, 0.0, 0.5],
        resample=True,
        do_resize=1,
        rescale_factor="x",
        crop_pct=0.9,
      ),
      ["image_mean=['a']", "image_std=(0.5, 0.0, 0.5)", "resample=True"]
      + ["do_resize=1", "rescale_factor='x'", "crop_pct=0.9"],
    ),
    (dict(image_mean=[0.5]), ["of 3 channels"]),
    (dict(size={"longest_edge": 32}), ["size={'longest_edge': 32}"]),
    (dict(size={"shortest_edge": 32}), ["without do_center_crop"]),
    (dict(size=[[1]]), ["size=[[1]]"]),
    (dict(size=10**400), ["size=1"]),
    (dict(size=10**9), ["image_size=1000000000", "resize_to at most 32768"]),
    (dict(do_center_crop=True), ["crop_size=None"]),
    (dict(do_pad=True), ["do_pad=True is not supported"]),
    (dict(image_processor_type="ConvNextImageProcessor"), ["ConvNext"]),
  ],
)
def test_every_fault_of_a_preprocessing_is_in_one_error(vision, changes, parts):
  good = dict(size=32, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
  path = vision / "preprocessor_config.json"
  path.write_text(json.dumps(good))
  assert interop.load(vision)[2].image_size == 32
  edit(vision, path.name, **changes)
  message = faults(vision)
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  "text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "1" * 5000, "", "[]"]
)
@pytest.mark.parametrize("file", ["config.json", files.INDEX])
def test_json_that_cannot_be_read(language, file, text):
  (language / file).write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=file) as error:
    interop.load(language)
  assert type(error.value) is ValueError


def test_values_that_are_not_finite_are_listed(vision):
  tensors = stored(vision)
  names = sorted(name for name in tensors if name.endswith("weight"))[:3]
  for name, value in zip(names, (np.nan, np.inf, 1e300), strict=True):
    tensors[name] = tensors[name].astype(np.float64)
    tensors[name].flat[-1] = value
  save_file(tensors, vision / files.SINGLE, metadata={"format": "pt"})
  message = faults(vision)
  assert "3 tensors do not fit" in message
  assert f"not finite: {names[0]} holds NaN or infinity" in message
  assert f"not finite: {names[1]} holds NaN or infinity" in message
  beyond = f"overflow: {names[2]} holds values beyond the range of float32"
  assert beyond in message


def test_half_precision_that_is_asked_for_must_hold_the_values(vision):
  tensors = stored(vision)
  tensors["classifier.bias"][0] = 1e5
  save_file(tensors, vision / files.SINGLE, metadata={"format": "pt"})
  assert interop.load(vision)[1]["head"]["classifier"]["bias"][0] == 1e5
  beyond = "overflow: classifier.bias .*float16"
  with pytest.raises(interop.CheckpointError, match=beyond):
    interop.load(vision, param_dtype=np.float16)


def test_a_tensor_in_two_files(language):
  first, second = sorted(language.glob("model-*.safetensors"))[:2]
  tensors = {}
  for path in (first, second):
    with files.opened(path) as file:
      tensors |= {name: file.get_tensor(name) for name in file.keys()}
  save_file(tensors, second, metadata={"format": "pt"})
  assert "tensors are in two files" in faults(language)


@pytest.mark.parametrize("ends", ["a", [1, "b"], True, -1, 2.0])
def test_ends_are_ids(language, ends):
  tokenizer(language, 3)
  edit(language, eos_token_id=ends)
  with pytest.raises(ValueError, match=r"config.json: eos_token_id="):
    interop.load(language)


def tokenizer(folder, largest):
  from tokenizers import Tokenizer, models

  made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": largest}, "[UNK]"))
  made.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_has_no_more_ids_than_the_embedding(language):
  tokenizer(language, 39)
  assert interop.load(language)[2].encode("a") == [39]
  tokenizer(language, 40)
  with pytest.raises(ValueError, match=r"ids up to 40 \('a'\).* 40 rows"):
    interop.load(language)
  tokenizer(language, 39)
  edit(language, eos_token_id=[2, 40])
  with pytest.raises(ValueError, match=r"eos_token_id=\[40\].* 40 rows"):
    interop.load(language)
