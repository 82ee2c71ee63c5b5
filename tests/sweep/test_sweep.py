"""The sweep from end to end, on models of a second or two."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import imagenet_pareto
from experiments import sweep, typed
from experiments.sweeps import classification
from experiments.sweeps.results import Results
from experiments.sweeps.subject import Job
from tests.experiments import tiny
from tokjax import interop
from tokjax.models import ViT, ViTConfig

MODEL = dict(
  name="vit", image_size=8, patch_size=2, channels=1, width=8, depth=2,
  heads=2, mlp_dim=16, num_classes=10,
)  # fmt: skip


def config(**changes):
  return {
    "subject": dict(
      name="trained", train=tiny.config(model=MODEL, steps=2), seeds=2
    ),
    "recipes": ("topk", "tomesd"),
    "keeps": (0.5, 0.2),
    "batch_size": 90,
    "rounds": 2,
    "pictures": 2,
    **changes,
  }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("sweep")
  return workdir, sweep.main(config(), workdir)


def test_writes_rows_plots_and_what_cannot_be_reached(done):
  workdir, _ = done
  found = json.loads((workdir / "pareto.json").read_text())
  rows = {(row["method"], row["keep"]): row for row in found["rows"]}
  assert set(rows) == {
    ("none", 1.0), ("topk", 0.5), ("topk", 0.2), ("tomesd", 0.5),
  }  # fmt: skip
  (lost,) = found["unreachable"]
  assert (lost["method"], lost["keep"]) == ("tomesd", 0.2)
  assert "removes at most" in lost["reason"]
  assert rows["none", 1.0]["tokens_per_block"] == [17, 17]
  assert rows["tomesd", 0.5]["tokens_per_block"] == [9, 9]
  assert rows["topk", 0.5]["gflops"] < rows["none", 1.0]["gflops"]
  for row in rows.values():
    assert 0 <= row["accuracy"] <= 1
    assert row["images_per_second"] > 0
    assert row["speedup"] > 0
  assert rows["none", 1.0]["drift"] == pytest.approx(0, abs=1e-6)
  for name in ("pareto.png", "merges.png"):
    assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_accuracy_is_that_of_the_model_applied_plainly(done):
  workdir, results = done
  made = sweep.load(config())
  subject = made.subject.prepare(workdir)
  job = Job("topk", 0.2)
  model = subject.build(job.slots())
  apply = jax.jit(model.apply)
  hits = [0, 0]
  for batch in subject.batches(180):
    for seed, params in enumerate(subject.weights):
      logits, _ = apply({"params": params}, batch["image"])
      hits[seed] += (np.asarray(logits).argmax(-1) == batch["label"]).sum()
  (row,) = [
    r for r in results.rows if (r["method"], r["keep"]) == ("topk", 0.2)
  ]
  assert row["accuracy"] == pytest.approx(sum(hits) / 720, abs=1e-9)
  lost = results.whole["accuracy"] - row["accuracy"]
  assert row["lost"] == pytest.approx(100 * lost)
  assert np.mean(row["lost_by_seed"]) == pytest.approx(row["lost"])
  assert hits[0] != hits[1], "two seeds are two models"


def test_goes_on_where_it_was_and_keeps_the_numbers(done, monkeypatch):
  workdir, results = done
  compiled = []
  kind = classification.ClassificationSubject
  compile_one = kind.compile

  def spy(subject, job):
    compiled.append((job.method, job.keep))
    return compile_one(subject, job)

  monkeypatch.setattr(kind, "compile", spy)
  path = workdir / "pareto.json"
  whole = json.loads(path.read_text())
  rows = [r for r in whole["rows"] if (r["method"], r["keep"]) != ("topk", 0.2)]
  path.write_text(json.dumps({**whole, "rows": rows}))
  again = sweep.main(config(), workdir)
  assert compiled == [("none", None), ("topk", 0.2)]
  numbers = lambda found: {
    (r["method"], r["keep"]): (r["accuracy"], r["drift"], r["gflops"])
    for r in found.rows
  }
  assert numbers(again) == numbers(results)


def test_another_subject_does_not_mix_with_the_rows(tmp_path):
  made = sweep.load(config())
  other = sweep.load(config(batch_size=45))
  path = tmp_path / "pareto.json"
  first = Results(path, made.fingerprint())
  first.save([{"method": "topk", "keep": 0.5}])
  assert Results(path, made.fingerprint()).rows
  assert not Results(path, other.fingerprint()).rows
  assert len(list(tmp_path.glob("pareto.*.json"))) == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"keeps": (0.0,)}, "not in"),
    ({"keeps": (1.0000001,)}, "not in"),
    ({"keeps": (float("nan"),)}, "nan"),
    ({"keeps": (True,)}, "keeps.0.=True"),
    ({"picture_keep": 0.0}, "picture_keep"),
    ({"shares": ()}, "shares"),
    ({"rounds": 0}, "rounds=0"),
    ({"keep": 0.5}, "config.keep: unknown key"),
    ({"subject": {"name": "magic"}}, "must be one of"),
  ],
)
def test_bad_configs_are_refused(changes, message):
  with pytest.raises(typed.ConfigError, match=message):
    sweep.load(config(**changes))


def test_unknown_recipes_are_refused_before_training(tmp_path):
  with pytest.raises(KeyError, match="tome"):
    sweep.main(config(recipes=("tomee",)), tmp_path)


def test_unknown_names_are_config_errors(tmp_path):
  """One line on the command line; nothing is written."""
  for changes, message in (
    ({"recipes": ("tomee",)}, "unknown recipe 'tomee'; did you mean"),
    ({"families": ("visions",), "recipes": ()}, "'visions' is not among"),
  ):
    with pytest.raises(typed.ConfigError) as error:
      sweep.main(config(**changes), tmp_path / "new")
    assert message in str(error.value) and not str(error.value)[0] == '"'
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workdir", ["", __file__, __file__ + "/below"])
def test_a_workdir_that_cannot_be_written_is_refused(workdir):
  with pytest.raises(typed.ConfigError, match="workdir=.*must be a directory"):
    sweep.main(config(), workdir)


ROW = {"method": "topk", "keep": 0.5, "accuracy": 0.5}
WELL = {"fingerprint": "0" * 16, "config": {}, "rows": [ROW], "unreachable": []}


@pytest.mark.parametrize(
  "content",
  [
    b"", b"{", b"\xff\x00", b"[1, 2]", b"[" * 100_000,
    *(
      json.dumps({**WELL, **changes}).encode()
      for changes in (
        {"fingerprint": None}, {"rows": {}}, {"rows": [3]},
        {"rows": [ROW, {"method": "topk", "keep": 0.2}]},
        {"rows": [{"accuracy": 0.5}]}, {"unreachable": [ROW]},
        {"rows": [{**ROW, "method": "none"}] * 2},
      )
    ),
  ],
  ids=range(12),
)  # fmt: skip
def test_damaged_results_are_named_before_training(tmp_path, content):
  path = tmp_path / "pareto.json"
  path.write_bytes(content)
  with pytest.raises(typed.ConfigError, match="pareto.json: is damaged"):
    sweep.main(config(), tmp_path)
  assert path.read_bytes() == content and not (tmp_path / "train").exists()


def test_the_command_answers_in_one_line(tmp_path):
  command = [sys.executable, "-m", "experiments.sweep", "--workdir"]
  done = subprocess.run(
    [
      *command, str(tmp_path), "--config", "configs/digits_pareto.py:runlocal",
      "--config.recipes=('tomee',)",
    ],
    cwd=pathlib.Path(__file__).resolve().parents[2], text=True,
    capture_output=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("error: unknown recipe")
  assert "Traceback" not in done.stderr


# ----- A published checkpoint and a data set by name -----


class TinyShapes(tfds.core.GeneratorBasedBuilder):
  """Forty squares of noise in the format of tensorflow-datasets."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(shape=(20, 24, 3), dtype=np.uint8),
          "label": tfds.features.ClassLabel(num_classes=2),
        }
      )
    )

  def _split_generators(self, manager):
    del manager
    return {"validation": self._generate_examples()}

  def _generate_examples(self):
    rng = np.random.default_rng(0)
    for i in range(40):
      image = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
      yield i, {"image": image, "label": i % 2}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A prepared data set and a checkpoint with its preprocessing."""
  data = tmp_path_factory.mktemp("data")
  builder = TinyShapes(data_dir=data, file_format="array_record")
  builder.download_and_prepare()
  folder = tmp_path_factory.mktemp("checkpoint")
  model = ViTConfig(
    image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_dim=32,
    num_classes=5, epsilon=1e-12,
  )  # fmt: skip
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(ViT(model).init, jax.random.key(0), image)
  rng = np.random.default_rng(1)
  draw = lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes["params"])
  how = interop.Preprocessing((0.5,) * 3, (0.5,) * 3, 16)
  interop.save(folder, model, params, preprocessing=how)
  return data, folder


def pretrained(published, **changes):
  data, folder = published
  return dict(
    name="pretrained",
    checkpoint=str(folder),
    data=dict(
      name="tfds_images", builder="tiny_shapes", data_dir=str(data),
      num_classes=2,
    ),
    **{"classes": (3, 1), **changes},
  )  # fmt: skip


def test_a_checkpoint_on_a_data_set_by_name(published, tmp_path):
  made = config(
    subject=pretrained(published), recipes=("tome",), keeps=(0.5,),
    batch_size=16,
  )  # fmt: skip
  results = sweep.main(made, tmp_path)
  assert [row["method"] for row in results.rows] == ["none", "tome"]
  assert results.rows[1]["drift"] > 1e-6
  model, params, how = interop.load(published[1])
  rng = np.random.default_rng(0)
  images = [
    rng.integers(0, 256, (20, 24, 3)).astype(np.uint8) for _ in range(40)
  ]
  logits, _ = model.apply(
    {"params": params}, jax.numpy.stack([how(image) for image in images])
  )
  meant = np.tile([3, 1], 20)
  expected = (np.asarray(logits).argmax(-1) == meant).mean()
  assert results.whole["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("arg", ["imagenet2012", "imagenette"])
def test_the_shipped_configs_are_well_formed(arg):
  made = sweep.load(imagenet_pareto.get_config(arg))
  classes = made.subject.classes or range(made.subject.data.num_classes)
  assert len(classes) == made.subject.data.num_classes
  assert len(made.methods()) >= 20


def test_labels_that_do_not_fit_the_checkpoint_are_refused(published, tmp_path):
  made = sweep.load(config(subject=pretrained(published, classes=())))
  with pytest.raises(ValueError, match="2 classes, a checkpoint of 5"):
    made.subject.prepare(tmp_path)
  made = sweep.load(config(subject=pretrained(published, classes=(1, 2, 3))))
  with pytest.raises(ValueError, match="3 entries for 2 labels"):
    made.subject.prepare(tmp_path)
