"""Models in the published layout: what is written is what is read."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.decoder.models import FAMILIES, config, params_of
from tests.experiments.published_checkpoints import LABELS, VIT, vit_params
from tests.interop.helpers import assert_same_tensors, images, stored
from tokjax import budgets, interop, recipes
from tokjax.interop import files
from tokjax.interop.pretrained import LAYOUTS
from tokjax.models import ViT
from tokjax.models.rotary import Rotary

CLASSES = {
  "llama2": "LlamaForCausalLM",
  "llama3": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3": "Gemma3ForCausalLM",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_round_trip(family, tmp_path):
  own = config(**FAMILIES[family])
  params = params_of(own)
  interop.save(tmp_path, own, params)
  whole = files.read_json(tmp_path / "config.json")
  assert whole["architectures"] == [CLASSES[family]]
  resolved = LAYOUTS[CLASSES[family]].resolved
  back, loaded, _ = interop.load(tmp_path)
  assert resolved(back.config) == resolved(own)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(layers=("sliding", "full"), window=4), "layers=.*sliding"),
    (dict(qk_norm=True), "qk_norm=True"),
    (dict(logit_softcap=2.0), "logit_softcap=2.0"),
    (
      dict(rotary=Rotary(scaling="dynamic", factor=2.0, original_length=8)),
      "original_length=8",
    ),
  ],
)
def test_what_a_class_cannot_hold(changes, message, tmp_path):
  own = config(**changes)
  with pytest.raises(ValueError, match=message):
    interop.save(tmp_path, own, params_of(own), layout="LlamaForCausalLM")
  assert not list(tmp_path.iterdir())


def test_no_class_holds_it(tmp_path):
  own = config(logit_softcap=2.0, qkv_bias=True)
  with pytest.raises(ValueError, match="no layout can hold.*LlamaForCausalLM"):
    interop.save(tmp_path, own, params_of(own))
  with pytest.raises(ValueError, match="cannot hold a DecoderConfig"):
    interop.save(tmp_path, own, params_of(own), layout="timm")


def test_labels(tmp_path):
  interop.save(tmp_path, VIT, vit_params(), labels=LABELS)
  assert interop.labels_of(tmp_path) == LABELS
  whole = files.read_json(tmp_path / "config.json")
  assert whole["label2id"]["crane"] == 1
  with pytest.raises(ValueError, match="2 names for a model of 4 classes"):
    interop.save(tmp_path, VIT, vit_params(), labels=LABELS[:2])
  interop.save(tmp_path, VIT, vit_params())
  assert interop.labels_of(tmp_path) == ()
  files.write_json(tmp_path / "config.json", {"id2label": {"1": "a"}})
  with pytest.raises(interop.ConfigError, match="id2label"):
    interop.labels_of(tmp_path)


def test_labels_of_timm(tmp_path):
  whole = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "tench"}}
  files.write_json(tmp_path / "config.json", whole)
  assert interop.labels_of(tmp_path) == ("tench, n1", "n2")


def test_all_files_can_be_read_by_the_same_people(tmp_path):
  interop.save(tmp_path, VIT, vit_params())
  modes = {p.stat().st_mode for p in tmp_path.iterdir()}
  assert len(modes) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  interop.save(tmp_path, VIT, vit_params())
  before = stored(tmp_path)

  def fail(tensors, path, metadata):
    path.write_bytes(b"part")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files, "save_file", fail)
  with pytest.raises(OSError, match="No space"):
    interop.save(tmp_path, VIT, vit_params(seed=1))
  assert_same_tensors(before, stored(tmp_path))
  assert {p.name for p in tmp_path.iterdir()} == {
    "config.json", "model.safetensors",
  }  # fmt: skip


# ----- Recipes with parameters -----

TWO = dataclasses.replace(VIT, depth=2)
OPTIONS = {"budget": budgets.Once(0.5, 0)}
SLOTS = recipes.get("dynamicvit", **OPTIONS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A folder with a recipe, and the parameters in it."""
  key = jax.random.key(0)
  model = ViT(TWO, SLOTS)
  params = jax.jit(lambda x: model.init(key, x, key=key)["params"])(inputs())
  folder = tmp_path_factory.mktemp("exported")
  interop.save(folder, TWO, params, recipe=("dynamicvit", OPTIONS))
  return folder, params


def inputs():
  return images(16, 16)


def test_learned_parts_come_back_with_the_recipe(exported):
  folder, params = exported
  name, options = interop.recipe_of(folder)
  assert (name, options) == ("dynamicvit", OPTIONS)
  slots = recipes.get(name, **options)
  model, loaded, _ = interop.load(folder, slots=slots)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert model.slots == slots
  plain = interop.load(folder)[1]
  assert "learned_0" not in plain["encoder"]["block_0"]
  assert not any("learned" in name for name in stored_plain(folder))


def stored_plain(folder):
  with files.opened(folder / files.SINGLE) as file:
    return list(file.keys())


def test_learned_parts_of_another_recipe(exported):
  folder, params = exported
  interop.load(folder, slots=recipes.get("tome", keep=0.5))
  later = recipes.get("dynamicvit", budget=budgets.Once(0.5, 1))
  with pytest.raises(interop.CheckpointError) as error:
    interop.load(folder, slots=later)
  assert "tokjax.safetensors for recipe 'dynamicvit'" in str(error.value)
  assert "missing: encoder/block_1/learned_0" in str(error.value)
  assert "extra: encoder/block_0/learned_0" in str(error.value)
  with pytest.raises(interop.CheckpointError, match="extra: encoder/block_0"):
    interop.save(folder / "plain", TWO, params)


def test_a_recipe_is_forgotten_with_its_model(exported, tmp_path):
  _, params = exported
  interop.save(tmp_path, TWO, params, recipe=("dynamicvit", OPTIONS))
  interop.save(tmp_path, VIT, vit_params())
  assert interop.recipe_of(tmp_path) is None
  assert not (tmp_path / "tokjax.safetensors").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"format": "other"}, "format='other'"),
    ({"options": []}, r"options=\[\]"),
    ({"options": {"budget": {"budget": "counts"}}}, "name of a budget"),
    ({"options": {"budget": {"budget": "Once", "keep": 3.0}}}, "budget: keep"),
    ({"options": {"budget": {"budget": "Once", "keep": 0.5, "x": 3}}}, "'x'"),
  ],
)
def test_a_strange_note(change, message, exported, tmp_path):
  folder, _ = exported
  whole = json.loads((folder / "tokjax.json").read_text())
  files.write_json(tmp_path / "tokjax.json", {**whole, **change})
  with pytest.raises(ValueError, match=message):
    interop.recipe_of(tmp_path)


def test_options_that_json_cannot_hold(tmp_path):
  with pytest.raises(ValueError, match="option x=<object"):
    interop.save(tmp_path, VIT, vit_params(), recipe=("tome", {"x": object()}))
  assert not list(tmp_path.iterdir())
