"""Runs from published checkpoints, and back: train, export, load."""

import dataclasses
import re
import sys

import huggingface_hub
import jax
import numpy as np
import pytest

from configs.learned import finetune
from experiments import evaluate, export, launch, sources, train
from experiments.data import DATA, DataError, pipeline
from experiments.sweeps.classifiers import Pretrained
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import published, trees
from experiments.training.errors import CheckpointError, WorkdirError
from experiments.typed import ConfigError
from tests.experiments import tiny
from tests.experiments.published_checkpoints import (
  DECODER,
  HOW,
  LABELS,
  VIT,
  write_images,
  write_llama,
  write_texts,
  write_vit,
)
from tokjax import interop, recipes
from tokjax.interop import files


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
  return write_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return write_images(tmp_path_factory.mktemp("images"))


def fine_tuning(vit, images, **changes):
  """The shipped config, two steps."""
  words = f"checkpoint={vit},images={images},runlocal"
  config = finetune.get_config(words).to_dict()
  return {**config, **changes}


@pytest.fixture(scope="module")
def run(vit, images, tmp_path_factory):
  """DynamicViT on a checkpoint, which is also the teacher: run and folder."""
  folder = tmp_path_factory.mktemp("run")
  return train.main(fine_tuning(vit, images), folder), folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "model"
  return export.main(run[1], out)


def forward(model, params, images):
  """Logits, compiled."""
  return jax.jit(lambda p, x: model.apply({"params": p}, x)[0])(params, images)


# ----- Start -----


def test_the_config_takes_everything_from_the_checkpoint(vit, images):
  config = config_lib.load(fine_tuning(vit, images))
  assert config.model == VIT
  assert config.data.classes == LABELS and config.data.num_classes == 4
  assert config.data.preprocessing == HOW and config.data.size == 16
  assert config.data.mean == HOW.mean and config.data.std == HOW.std
  assert config.recipe.name == "dynamicvit" and config.teacher == str(vit)
  labels = {label for _, label in config.data.source("train").files}
  assert labels == {0, 2}
  # What a run saves is complete: the checkpoint is not asked again.
  written = config.to_dict()
  assert written["model"]["name"] == "vit"
  assert config_lib.load(written) == config


def test_parameters_of_the_checkpoint_and_fresh_ones(vit, run):
  done, _ = run
  mesh = mesh_lib.Mesh().build()
  own = trees.named(published.first_params(done.config, mesh))
  for name, value in trees.named(interop.load(vit)[1]).items():
    np.testing.assert_array_equal(own[name], value, err_msg=name)
  learned = trees.named(done.params).keys() - own.keys()
  assert learned and all("/learned_0/" in name for name in learned)
  # Two steps of a small rate do not go far.
  trained = trees.named(done.params)
  far = [np.abs(trained[name] - value).max() for name, value in own.items()]
  assert 0 < max(far) < 1e-2
  assert done.finished and 0 < done.metrics["loss"] < 20


def test_images_are_prepared_as_the_checkpoint_says(vit, images):
  data = config_lib.load(fine_tuning(vit, images)).data
  element = data.source("test")[0]
  np.testing.assert_array_equal(
    data.prepare(element)["image"], HOW(element["image"])
  )


def test_a_run_goes_on_with_the_same_config(vit, images, run):
  """The checkpoint gives the same config again, and is not started from."""
  done, folder = run
  again = train.main(fine_tuning(vit, images), folder)
  assert again.config == done.config and again.finished
  tiny.assert_same(trees.named(again.params), trees.named(done.params))


def test_a_head_of_its_own(vit, images, tmp_path):
  words = f"checkpoint={vit},images={images},head=new,recipe=none,runlocal"
  config = config_lib.load(finetune.get_config(words))
  assert config.model == dataclasses.replace(VIT, num_classes=2)
  assert config.data.classes == ("Tench", "golden_retriever")
  assert config.teacher is None and config.fresh == f"({published.HEADS})"
  more = dataclasses.replace(
    config, model=published.FromInit("new", 24), fresh="norm"
  )
  assert more.fresh == f"(norm)|({published.HEADS})"
  assert more.model.image_size == more.data.size == 24
  assert more.data.preprocessing.image_size == 24
  done = train.main(config, tmp_path / "run")
  assert done.params["head"]["classifier"]["kernel"].shape == (16, 2)
  out = export.main(tmp_path / "run", tmp_path / "out")
  assert interop.labels_of(out) == ("Tench", "golden_retriever")
  assert not (out / "tokjax.json").exists()


def test_fresh_parameters_are_left_out():
  params = {"a": {"b": 1, "c": 2}, "d": 3}
  assert published.without_fresh(params, "/b$", params) == {
    "a": {"c": 2}, "d": 3,
  }  # fmt: skip
  with pytest.raises(ValueError, match="'x' matches no parameter"):
    published.without_fresh(params, "x", params)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(init="/nowhere/at/all"), "neither a folder.*workdir of a run"),
    (dict(init="smollm2x"), "neither a folder.*nor a hub id"),
    (dict(init=None), "init must name a published"),
    (dict(model=dict(name="init", head="old")), "head='old'"),
    (dict(data=dict(name="digits")), "4 classes, the data 10; for a"),
    (dict(fresh="("), "no regular expression"),
    (
      dict(
        model=dict(name="init", head="new"),
        data=dict(name="folder_images", path="nowhere"),
      ),
      "nowhere/train: no such folder",
    ),
  ],
)
def test_what_a_run_cannot_start_from(changes, message, vit, images):
  with pytest.raises((ConfigError, DataError, OSError), match=message):
    config_lib.load(fine_tuning(vit, images, **changes))


def test_another_architecture_is_refused(vit, images, tmp_path):
  model = dataclasses.asdict(VIT) | dict(name="vit", epsilon=1e-6)
  changed = fine_tuning(vit, images, model=model, teacher=None)
  with pytest.raises(ConfigError, match="epsilon=1e-12 .config: 1e-06."):
    train.main(changed, tmp_path)


def test_a_teacher_with_other_classes_or_images(vit, images, tmp_path):
  words = f"checkpoint={vit},images={images},head=new,runlocal"
  config = config_lib.load(finetune.get_config(words))
  taught = dataclasses.replace(config, teacher=str(vit))
  with pytest.raises(ConfigError, match="its num_classes is 4, .* model 2"):
    train.main(taught, tmp_path)
  how = dataclasses.replace(HOW, mean=(0.1,) * 3)
  other = write_vit(tmp_path / "other", preprocessing=how)
  own = config_lib.load(fine_tuning(vit, images))
  with pytest.raises(ConfigError, match="expects images with mean=.0.1"):
    train.main(dataclasses.replace(own, teacher=str(other)), tmp_path)
  turned = write_vit(tmp_path / "turned", labels=LABELS[::-1])
  with pytest.raises(ConfigError, match="labels are in another order"):
    train.main(dataclasses.replace(own, teacher=str(turned)), tmp_path)


def test_classes_that_are_no_labels(vit, images, tmp_path):
  for split in ("train", "test"):
    (write := tmp_path / split).mkdir(parents=True)
    (write / "trout").mkdir()
  with pytest.raises(DataError, match="'trout'; the 4 labels are: 'tench, Ti"):
    config_lib.load(fine_tuning(vit, tmp_path))
  bare = write_vit(tmp_path / "bare", labels=())
  with pytest.raises(ConfigError, match="not name its 4 classes.*head=new"):
    config_lib.load(fine_tuning(bare, images))


def test_a_checkpoint_that_states_no_preprocessing(images, tmp_path):
  bare = write_vit(tmp_path, preprocessing=None)
  data = config_lib.load(fine_tuning(bare, images)).data
  assert data.preprocessing is None and data.size == 16
  assert data.prepare(data.source("test")[0])["image"].shape == (16, 16, 3)


def test_class_folders_in_the_order_of_labels(vit, tmp_path):
  own = write_images(tmp_path / "own", ("n1", "n2", "n3", "n4"), each=1)
  config = fine_tuning(vit, own)
  config["data"]["match"] = "order"
  made = config_lib.load(config)
  assert made.data.classes == ("n1", "n2", "n3", "n4")
  assert sources.labels(made, vit) == LABELS
  bare = write_vit(tmp_path / "bare", labels=())
  unnamed = config_lib.load({**config, "init": str(bare)})
  assert sources.labels(unnamed, bare) == ("n1", "n2", "n3", "n4")
  Pretrained(str(vit), made.data).prepare(tmp_path)
  (own / "train" / "n5").mkdir()
  with pytest.raises(DataError, match="the 5 folders are: 'n1'.* the 4 labels"):
    config_lib.load(config)


# ----- Evaluate -----


def test_a_checkpoint_on_a_folder(vit, images):
  changes = [("data.path", str(images)), ("eval_batch_size", "16")]
  found = evaluate.main(checkpoint=str(vit), changes=changes)
  model, params, how = interop.load(vit)
  data = DATA["folder_images"](path=str(images), classes=LABELS)
  source = [data.source("test")[i] for i in range(16)]
  logits = forward(model, params, np.stack([how(x["image"]) for x in source]))
  right = np.asarray(logits).argmax(-1) == [x["label"] for x in source]
  assert found["accuracy"] == pytest.approx(right.mean())
  with pytest.raises(ConfigError, match="token_learner' learns encoder/b"):
    evaluate.main(checkpoint=str(vit), recipe="token_learner", changes=changes)
  with pytest.raises(ConfigError, match="one of --workdir and --checkpoint"):
    evaluate.main()


def test_a_run_on_another_folder(run, tmp_path):
  _, workdir = run
  other = write_images(tmp_path / "one", ("crane", "bird"), each=4)
  config = evaluate.changed_config(
    workdir, changes=[("data.path", str(other))]
  )
  labels = {label for _, label in config.data.source("test").files}
  assert labels == {1, 3} and config.data.preprocessing == HOW
  unknown = write_images(tmp_path / "two", ("trout",), each=1)
  with pytest.raises(DataError, match="'trout'; the 4 labels"):
    evaluate.changed_config(workdir, changes=[("data.path", str(unknown))])
  renamed = [("data.name", "folder_images"), ("data.path", str(other))]
  assert evaluate.changed_config(workdir, changes=renamed).data.num_classes == 4


def test_a_run_that_does_not_name_its_classes(images):
  own = config_lib.load(tiny.light())
  data = DATA["folder_images"](path=str(images))
  changed = dataclasses.replace(own, data=data)
  with pytest.raises(ConfigError, match="w: does not name its classes"):
    evaluate.with_labels(changed, own, "w")


def test_a_sweep_of_a_checkpoint_on_a_folder(vit, images, tmp_path):
  data = DATA["folder_images"](path=str(images))
  made = Pretrained(str(vit), data).prepare(tmp_path)
  (batch,) = made.batches(16)
  assert set(batch["label"]) == {0, 2}
  with pytest.raises(DataError, match="classes has 4 names; .*classes is 2"):
    dataclasses.replace(data, classes=LABELS).source("test")
  element = data.for_checkpoint(None, LABELS).source("test")[0]
  np.testing.assert_array_equal(batch["image"][0], HOW(element["image"]))
  bare = write_vit(tmp_path / "bare", labels=())
  with pytest.raises(ConfigError, match="does not name its classes"):
    Pretrained(str(bare), data).prepare(tmp_path)
  trout = write_images(tmp_path / "images", ("trout",), each=1)
  other = DATA["folder_images"](path=str(trout))
  with pytest.raises(DataError, match="'trout'; the 4 labels are"):
    Pretrained(str(vit), other).prepare(tmp_path)


# ----- Export -----


def test_what_was_trained_is_what_is_loaded(run, exported):
  done, _ = run
  name, options = interop.recipe_of(exported)
  slots = recipes.get(name, **options)
  model, params, how = interop.load(exported, slots=slots)
  assert model == done.model and how == HOW
  tiny.assert_same(trees.named(params), trees.named(done.params))
  x = pipeline.heldout_arrays(done.config.data, 4)["image"]
  np.testing.assert_array_equal(
    forward(model, params, x), forward(done.model, done.params, x)
  )


def test_what_belongs_to_the_checkpoint_is_kept(vit, exported):
  names = ("preprocessor_config.json",)
  for name in names:
    assert (exported / name).read_bytes() == (vit / name).read_bytes()
  assert interop.labels_of(exported) == LABELS
  whole = files.read_json(exported / "config.json")
  assert whole["architectures"] == ["ViTForImageClassification"]
  assert whole == files.read_json(vit / "config.json")
  plain = trees.named(interop.load(exported)[1])
  assert plain.keys() == trees.named(interop.load(vit)[1]).keys()


def test_an_export_is_a_start(exported, images, run):
  config = config_lib.load(fine_tuning(exported, images))
  found = published.first_params(config, mesh_lib.Mesh().build())
  tiny.assert_same(trees.named(found), trees.named(run[0].params))


def test_the_source_is_found_through_runs(vit, run):
  config, workdir = run[0].config, run[1]
  second = dataclasses.replace(config, init=str(workdir))
  assert sources.source_of(second) == str(vit)
  assert sources.source_of(dataclasses.replace(config, init=None)) is None


def test_folders_that_are_not_written_to(run, tmp_path):
  _, workdir = run
  (tmp_path / "file").write_text("x")
  with pytest.raises(WorkdirError, match="is a file"):
    export.main(workdir, tmp_path / "file")
  with pytest.raises(WorkdirError, match="is not empty; take a new folder"):
    export.main(workdir, tmp_path)
  with pytest.raises(CheckpointError, match="does not exist"):
    export.main(tmp_path, tmp_path / "new")
  with pytest.raises(ValueError, match="layout='x': must be one of"):
    export.main(workdir, tmp_path / "new", layout="x")
  with pytest.raises(ValueError, match="dtype='int8'"):
    export.main(workdir, tmp_path / "new", dtype="int8")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


class Hub:
  """A hub that notes what it is asked, or refuses."""

  asked: list = []
  refuses = False

  def create_repo(self, name, **options):
    if self.refuses:
      raise RuntimeError("401 Unauthorized\n(more)")
    self.asked.append((name, options))

  def upload_folder(self, **options):
    self.asked.append(options)


def test_upload(run, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
  (tmp_path / "out").mkdir()
  out = export.main(
    run[1], tmp_path / "out", push="me/tiny", private=True, dtype="bfloat16"
  )
  made, sent = Hub.asked
  assert made == ("me/tiny", {"private": True, "exist_ok": True})
  assert sent["repo_id"] == "me/tiny" and sent["folder_path"] == str(out)
  slots = run[0].config.recipe.slots()
  leaves = jax.tree.leaves(interop.load(out, slots=slots, param_dtype=None)[1])
  assert {x.dtype.name for x in leaves} == {"bfloat16"}
  monkeypatch.setattr(Hub, "refuses", True)
  with pytest.raises(OSError, match="401 Unauth.*checkpoint is in") as error:
    export.main(run[1], tmp_path / "again", push="me/tiny")
  assert "\n" not in str(error.value)
  assert (tmp_path / "again" / "config.json").exists()
  with pytest.raises(ValueError, match="not a name"):
    export.main(run[1], tmp_path / "third", push="not a name")


def test_the_command_line(run, tmp_path, monkeypatch, capsys):
  words = ["--workdir", str(run[1]), "--out", str(tmp_path / "out")]
  monkeypatch.setattr(sys, "argv", ["export", *words])
  launch.start(export.COMMAND, export.from_command_line)
  assert capsys.readouterr().out.strip() == str(tmp_path / "out")
  with pytest.raises(SystemExit) as end:
    launch.start(export.COMMAND, export.from_command_line)
  assert re.fullmatch("error: out=.*: is not empty; .*", end.value.code)


# ----- Language models -----


def language(checkpoint, texts, **changes):
  return tiny.config(
    model=dict(name="init"),
    init=str(checkpoint),
    data=dict(name="folder_text", path=str(texts), length=16, heldout=8),
    task=dict(name="language"),
    steps=1,
    batch_size=8,
    eval_batch_size=8,
    **changes,
  )


def test_language_models_there_and_back(tmp_path):
  llama = write_llama(tmp_path / "in")
  recipe = dict(name="gated_attention")
  config = language(llama, write_texts(tmp_path / "texts"), recipe=recipe)
  done = train.main(config, tmp_path / "run")
  assert done.config.model == interop.config_from(llama)
  data = done.config.data
  assert data.num_classes == DECODER.vocabulary
  read = [data.source("train")[i] for i in range(8)]
  ids = np.concatenate([data.prepare(x)["tokens"] for x in read])
  assert 1 in ids and 2 < ids.max() < DECODER.vocabulary and 0 not in ids
  out = export.main(tmp_path / "run", tmp_path / "out")
  assert files.read_json(out / "config.json")["eos_token_id"] == 1
  name, options = interop.recipe_of(out)
  slots = recipes.get(name, **options)
  model, params, tokenizer = interop.load(out, slots=slots)
  assert model == done.model and "slots" in params["block_0"]
  assert "slots" not in interop.load(out)[1]["block_0"]
  assert (out / "tokenizer.json").read_bytes() == (
    llama / "tokenizer.json"
  ).read_bytes()
  tokens = np.asarray([tokenizer.encode("a cab.")], np.int32)
  np.testing.assert_array_equal(
    forward(model, params, tokens), forward(done.model, done.params, tokens)
  )


def test_a_language_model_as_teacher(tmp_path):
  llama = write_llama(tmp_path / "in")
  texts = write_texts(tmp_path / "texts")
  config = config_lib.load(language(llama, texts, teacher=str(llama)))
  mesh = mesh_lib.Mesh().build()
  model, params = published.load_teacher(config, mesh, "float32")
  assert model.config == config.model == interop.config_from(llama)
  tiny.assert_same(params, interop.load(llama)[1])
  other = dataclasses.replace(config.model, vocabulary=50)
  with pytest.raises(ConfigError, match="vocabulary is 40, .* model 50"):
    published.load_teacher(
      dataclasses.replace(config, model=other), mesh, "float32"
    )


def test_a_language_model_needs_text(vit, images, tmp_path):
  llama = write_llama(tmp_path)
  with pytest.raises(ConfigError, match="is a language model; the data is Fol"):
    config_lib.load(fine_tuning(llama, images))
  head = language(llama, tmp_path) | dict(model=dict(name="init", head="new"))
  with pytest.raises(ConfigError, match="head and image_size are for"):
    config_lib.load(head)
  (llama / "tokenizer.json").unlink()
  with pytest.raises(DataError, match="has no tokenizer.json"):
    config_lib.load(language(llama, tmp_path))
