"""Whatever is wrong with a checkpoint is said at once, and completely."""

import json
import pathlib
import re

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from tests.interop.helpers import (
  assert_same_tensors,
  config,
  random_params,
  stored,
)
from tokjax import interop


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "model"
  interop.save(path, config(), random_params(config()))
  return path


def rewrite(folder, change):
  tensors = stored(folder)
  change(tensors)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_one_error_lists_every_tensor(folder):
  def spoil(tensors):
    del tensors["vit.embeddings.cls_token"]
    del tensors["vit.encoder.layer.1.output.dense.bias"]
    tensors["classifier.weight"] = np.zeros((7, 32), np.float32)
    tensors["classifier.bias"] = np.zeros(5, np.int32)
    tensors["vit.encoder.layer.2.output.dense.bias"] = np.zeros(32, np.float32)

  rewrite(folder, spoil)
  with pytest.raises(interop.CheckpointError) as error:
    interop.load(folder)
  lines = str(error.value).splitlines()
  assert lines[0] == f"{folder}: 5 tensors do not fit"
  assert sorted(line.strip() for line in lines[1:]) == [
    "extra: vit.encoder.layer.2.output.dense.bias [32]",
    "misshapen: classifier.weight [7, 32], must be [5, 32]",
    "missing: vit.embeddings.cls_token [1, 1, 32]",
    "missing: vit.encoder.layer.1.output.dense.bias [32]",
    "wrong type: classifier.bias is I32, must be one of ('float64',"
    " 'float32', 'float16', 'bfloat16')",
  ]


def test_parameters_that_do_not_fit_are_not_written(tmp_path):
  params = random_params(config())
  del params["embed"]["class_token"]
  params["head"]["classifier"]["bias"] = np.zeros(6, np.float32)
  params["head"]["surplus"] = np.zeros(1, np.float32)
  with pytest.raises(interop.CheckpointError) as error:
    interop.save(tmp_path / "new", config(), params)
  for part in (
    "missing: embed/class_token",
    "misshapen: head/classifier/bias [6], must be [5]",
    "extra: head/surplus",
  ):
    assert part in str(error.value)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_refused(folder, name):
  (folder / "model.safetensors").rename(folder / name)
  with pytest.raises(FileNotFoundError, match=f"{name}.*not read.*unpickling"):
    interop.load(folder)


def test_shard_that_is_not_there(tmp_path):
  interop.save(tmp_path, config(), random_params(config()), shard_bytes=20_000)
  shards = sorted(tmp_path.glob("model-*.safetensors"))
  assert len(shards) > 2
  shards[1].unlink()
  with pytest.raises(FileNotFoundError, match=shards[1].name):
    interop.load(tmp_path)


def test_shards_hold_the_same_tensors(folder, tmp_path):
  params = random_params(config())
  interop.save(tmp_path, config(), params)
  interop.save(tmp_path, config(), params, shard_bytes=20_000)
  assert not (tmp_path / "model.safetensors").exists()
  assert_same_tensors(stored(folder), stored(tmp_path))
  model, loaded, _ = interop.load(tmp_path)
  assert model.config == config()
  np.testing.assert_array_equal(
    loaded["embed"]["position"], params["embed"]["position"]
  )
  interop.save(tmp_path, config(), params)
  left = [path.name for path in tmp_path.glob("*.safetensors*")]
  assert left == ["model.safetensors"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architectures": ["ResNetModel"]}, "ResNetModel.*ViTForImageClassif"),
    ({"architectures": None}, "no architectures"),
    ({"hidden_act": "relu"}, "hidden_act='relu': must be one of"),
    ({"patch_size": [8, 16]}, "patch_size=.*must be square"),
    ({"hidden_size": 33}, "width=33: must be a multiple of heads=4"),
  ],
)
def test_config_that_cannot_be_followed(folder, changes, message):
  edit_config(folder, **changes)
  with pytest.raises(ValueError, match=message):
    interop.load(folder)


def test_broken_files(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
    interop.load(tmp_path)
  with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
    interop.load(folder / "config.json")
  with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
    interop.load("./not/here")
  (folder / "config.json").write_text("{")
  with pytest.raises(ValueError, match="is not JSON"):
    interop.load(folder)


def test_overrides(folder):
  model, params, _ = interop.load(folder, num_classes=None)
  assert "classifier" not in params["head"]
  assert model.config == config(num_classes=None)
  with pytest.raises(TypeError, match="no option 'classes'.*num_classes"):
    interop.load(folder, classes=3)
  with pytest.raises(interop.CheckpointError) as error:
    interop.load(folder, num_classes=7, layer_scale=True)
  assert "misshapen: head/classifier/kernel [32, 5], must be [32, 7]" in str(
    error.value
  )
  assert "missing: encoder/block_1/scale2 [32]" in str(error.value)


def test_layout_that_cannot_hold_the_model(tmp_path):
  mean = config(pool="mean", class_token=False)
  with pytest.raises(ValueError, match="pool='mean'.*it means 'class'"):
    interop.save(
      tmp_path, mean, random_params(mean), layout="ViTForImageClassification"
    )
  with pytest.raises(ValueError, match="layout='CLIPModel': must be one of"):
    interop.save(tmp_path, mean, random_params(mean), layout="CLIPModel")
  conv = config(stem="conv")
  with pytest.raises(ValueError, match="no layout can hold this model"):
    interop.save(tmp_path, conv, random_params(conv))
  interop.save(tmp_path, mean, random_params(mean))
  assert json.loads((tmp_path / "config.json").read_text())["architecture"]


def test_hub_id_downloads_tables_and_tensors_only(folder, monkeypatch):
  asked = {}

  def download(repo_id, **options):
    asked.update(options, repo_id=repo_id)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  model, _, _ = interop.load("owner/name.of-model", revision="abc")
  assert model.config == config()
  assert asked == {
    "repo_id": "owner/name.of-model",
    "revision": "abc",
    "allow_patterns": ["*.safetensors", "*.json"],
  }


def test_hub_id_is_found_in_a_local_cache(folder, tmp_path, monkeypatch):
  commit = "0123456789abcdef0123456789abcdef01234567"
  repo = tmp_path / "cache" / "models--owner--cached"
  snapshot = repo / "snapshots" / commit
  snapshot.parent.mkdir(parents=True)
  folder.rename(snapshot)
  (repo / "refs").mkdir()
  (repo / "refs" / "main").write_text(commit)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  model, _, _ = interop.load("owner/cached")
  assert model.config == config()


def test_hub_that_cannot_be_reached():
  with pytest.raises(FileNotFoundError) as error:
    interop.load("owner/absent-model")
  assert re.search(r"owner/absent-model.*the hub did not", str(error.value))
  assert "pass the folder" in str(error.value)


def test_paths_may_be_strings(folder):
  assert interop.load(str(folder))[0] == interop.load(pathlib.Path(folder))[0]
