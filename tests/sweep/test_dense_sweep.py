"""The sweep of dense models, on a model of a second or two."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import dense_pareto
from experiments import sweep, typed
from experiments.data import photographs
from experiments.sweeps import dense
from tokjax import interop, recipes, zoo
from tokjax.models import DenseViT, DenseViTConfig, ViT, ViTConfig

BACKBONE = ViTConfig(
  image_size=16, patch_size=4, width=16, depth=2, heads=2, mlp_dim=24,
  pool="none", num_classes=None,
)  # fmt: skip
MODEL = DenseViT(DenseViTConfig(BACKBONE, widths=(4,)))
HOW = interop.Preprocessing((0.5,) * 3, (0.25,) * 3, 16)


def random_params():
  """Parameters that are all drawn."""
  images = np.zeros((1, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), images)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  drawn = [rng.normal(0, 0.5, x.shape).astype(np.float32) for x in leaves]
  return jax.tree.unflatten(tree, drawn)


@pytest.fixture(autouse=True)
def published(monkeypatch):
  """`interop.load` gives the small model."""
  params = random_params()
  monkeypatch.setattr(zoo, "resolve", lambda name: name)
  monkeypatch.setattr(interop, "load", lambda source: (MODEL, params, HOW))
  return params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two images, one wide and one square."""
  folder = tmp_path_factory.mktemp("photographs")
  rng = np.random.default_rng(1)
  for name, shape in (("wide.png", (20, 30, 3)), ("square.jpg", (24, 24, 3))):
    image = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
    image.save(folder / name)
  return folder


def config(folder, **changes):
  return {
    "subject": dict(name="dense", checkpoint="tiny", folder=str(folder)),
    "recipes": ("random", "topk", "tomesd", "downsample"),
    "keeps": (0.2,),
    "batch_size": 8,
    "rounds": 2,
    "pictures": 2,
    **changes,
  }


def test_rows_plots_and_what_goes_on(folder, tmp_path, published, monkeypatch):
  results = sweep.main(config(folder), tmp_path)
  found = json.loads((tmp_path / "dense.json").read_text())
  rows = {(row["method"], row["keep"]): row for row in found["rows"]}
  (lost,) = found["unreachable"]
  assert (lost["method"], lost["keep"]) == ("tomesd", 0.2)
  assert len(rows) == 1 + 3
  whole = rows["none", 1.0]
  assert whole["correlation"] == pytest.approx(1) and whole["drift"] == 0
  # Given back behind the last block, so that fewer tokens are in the blocks.
  assert rows["topk", 0.2]["tokens_per_block"][-1] == 5
  for row in (rows["topk", 0.2], rows["random", 0.2], rows["downsample", 0.2]):
    assert row["correlation"] < 0.9999 and row["lost_interval"] > 0
    assert row["gflops"] < whole["gflops"]
  for name in ("dense.png", "maps.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "dense.csv").read_text().startswith("method,keep,")
  check_row(folder, published, rows["topk", 0.2])

  compiled = []
  compile_one = dense.DenseSubject.compile

  def spy(subject, job):
    compiled.append((job.method, job.keep))
    return compile_one(subject, job)

  monkeypatch.setattr(dense.DenseSubject, "compile", spy)
  kept = [r for r in found["rows"] if (r["method"], r["keep"]) != ("topk", 0.2)]
  (tmp_path / "dense.json").write_text(json.dumps({**found, "rows": kept}))
  again = sweep.main(config(folder), tmp_path)
  assert compiled == [("none", None), ("topk", 0.2)]
  same = lambda r: {(x["method"], x["keep"]): x["correlation"] for x in r.rows}
  assert same(again) == pytest.approx(same(results))


def check_row(folder, params, row):
  """Correlation and difference are those of the models applied plainly."""
  parts = photographs.parts_of_all(photographs.in_folder(folder))
  assert len(parts) == 2 * (2 + 4) + 2 * (1 + 4)
  images = np.stack([HOW(part) for part in parts])
  reduced = DenseViT(
    MODEL.config, recipes.get("topk", keep=0.2, restore=True)
  )
  one, other = (
    np.asarray(jax.jit(model.apply)({"params": params}, images)[0])
    for model in (reduced, MODEL)
  )
  pairs = zip(one, other, strict=True)
  expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
  assert row["correlation"] == pytest.approx(np.mean(expected), abs=1e-4)
  assert row["drift"] == pytest.approx(np.abs(one - other).mean(), abs=1e-5)


def test_agreement_of_maps():
  ramp = np.linspace(0, 1, 12).reshape(1, 3, 4)
  maps = np.concatenate([ramp, 1 - ramp, 0 * ramp + 0.5, 0.5 * ramp])
  same, apart = dense.agreement(maps, ramp.repeat(4, axis=0))
  np.testing.assert_allclose(same, [1, -1, 0, 1], atol=1e-9)
  np.testing.assert_allclose(apart[[0, 3]], [0, 0.25], atol=1e-9)


def test_the_shipped_config_and_its_recipes():
  made = sweep.load(dense_pareto.get_config())
  assert isinstance(made, dense.Dense)
  assert {"expedit", "token_transforming", "random"} <= set(made.methods())
  assert made.job("tome", 0.5).options == (("restore", True),)
  assert "dynamicvit" not in made.methods()  # has to be trained
  warm = dataclasses.replace(made, options={"expedit": {"temperature": 0.02}})
  options = dict(warm.job("expedit", 0.5).options)
  assert options == {"temperature": 0.02, "restore": True}
  assert warm.fingerprint() != made.fingerprint()
  wrong = dataclasses.replace(made, options={"expedit": {"temper": 1}})
  with pytest.raises(typed.ConfigError, match="'temper' must be one of"):
    wrong.methods()


def test_photographs_that_packages_carry():
  found = photographs.packaged()
  assert sorted(found) == ["china", "flower", "grace_hopper"]
  parts = photographs.parts_of_all(found)
  assert len(parts) == 36
  # The largest of each stand first.
  assert [part.size for part in parts[:3]] == [(427, 427)] * 2 + [(512, 512)]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(folder="/nowhere"), "folder='/nowhere': is no folder"),
    (dict(folder=""), "is a ViT, which makes no map"),
    (dict(shares=()), "shares="),
    (dict(pictures=0), "pictures=0"),
  ],
)
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, changes, message):
  if changes.get("folder") == "":
    other = (ViT(dataclasses.replace(BACKBONE, pool="class")), {}, HOW)
    monkeypatch.setattr(interop, "load", lambda source: other)
  folder = changes.pop("folder", "")
  with pytest.raises((typed.ConfigError, ValueError), match=message):
    sweep.main(config(folder, **changes), tmp_path)


def test_a_folder_without_images(tmp_path):
  (tmp_path / "note.txt").write_text("x")
  with pytest.raises(FileNotFoundError, match="has no image"):
    photographs.in_folder(tmp_path)
  (tmp_path / "broken.png").write_text("x")
  with pytest.raises(ValueError, match="is no image that can be read"):
    photographs.in_folder(tmp_path)


def test_a_model_that_was_not_fetched(tmp_path, monkeypatch):
  def resolve(name):
    raise zoo.FetchError(f"{name} is not here yet: tokjax models get {name}")

  monkeypatch.setattr(zoo, "resolve", resolve)
  with pytest.raises(typed.ConfigError, match="tokjax models get tiny"):
    sweep.main(config(""), tmp_path)
