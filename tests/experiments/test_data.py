"""Data: sources by name, augmentation, packing, errors."""

import pathlib

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import DATA, DataError, pipeline, randaugment, tfds_source
from experiments.data import images as images_lib
from experiments.data import text as text_lib
from experiments.training import config as config_lib
from tests.experiments import tiny


def batches(data, batch_size=8, **changes):
  config = config_lib.load(
    tiny.config(data=data, batch_size=batch_size, **changes)
  )
  return pipeline.train_batches(config)


def folder(
  path: pathlib.Path, classes=3, each=4, size=(20, 14)
) -> pathlib.Path:
  """Images of one colour a class, with train and test."""
  for split in ("train", "test"):
    for k in range(classes):
      target = path / split / f"class{k}"
      target.mkdir(parents=True)
      for i in range(each):
        Image.new("RGB", size, (80 * k, i, 0)).save(target / f"{i}.png")
  return path


def test_position_is_restored_anywhere():
  for count in (0, 1, 7):
    data = dict(name="standard_library", length=16)
    first = batches(data)
    for _ in range(count):
      next(first)
    state = first.get_state()
    expected = [next(first)["tokens"] for _ in range(3)]
    second = batches(data)
    second.set_state(state)
    for tokens in expected:
      np.testing.assert_array_equal(tokens, next(second)["tokens"])


def test_order_and_augmentation_follow_the_seed():
  one, same = next(batches(DIGITS)), next(batches(DIGITS))
  other = next(batches(DIGITS, seed=1))
  np.testing.assert_array_equal(one["image"], same["image"])
  assert not np.array_equal(one["image"], other["image"])


DIGITS = dict(name="digits")


def test_an_epoch_has_every_example_once():
  data = DATA["digits"]()
  examples = grain.MapDataset.source(data.source("train")).seed(0).shuffle()
  values = [examples[i]["image"].tobytes() for i in range(len(examples))]
  assert sorted(values) == sorted(
    e["image"].tobytes() for e in data.source("train")
  )


def test_held_out_rows_count_once():
  data = DATA["digits"]()
  parts = list(pipeline.heldout_batches(data, 100))
  assert all(p["image"].shape == (100, 8, 8, 1) for p in parts)
  weight = np.concatenate([p["weight"] for p in parts])
  found = np.concatenate([p["image"] for p in parts])[weight == 1]
  np.testing.assert_array_equal(found, pipeline.heldout_arrays(data)["image"])


def test_train_and_held_out_digits_differ():
  train, test = (
    {e["image"].tobytes() for e in text}
    for text in (DATA["digits"]().source(s) for s in ("train", "test"))
  )
  assert len(test) == 360 and not train & test


def test_a_grid_shows_its_digits_and_is_labelled_by_the_largest():
  data = DATA["digit_grid"](side=3, digits=2)
  known = {
    e["image"].tobytes(): int(e["label"])
    for e in DATA["digits"]().source("test")
  }
  for element in data.source("test")[:20]:
    found = data.prepare(element)
    again = data.prepare(element)
    np.testing.assert_array_equal(found["image"], again["image"])
    cells = (found["image"] * 6 + 5).round().reshape(3, 8, 3, 8, 1)
    cells = cells.swapaxes(1, 2).reshape(9, 8, 8, 1).astype(np.float32)
    shown = [known[c.tobytes()] for c in cells if c.tobytes() in known]
    assert len(shown) == 2 and int(element["label"]) in shown
    assert found["label"] == max(shown)
  places = {data.augment(element, np.random.default_rng(i))["image"].tobytes()
            for i in range(5)}  # fmt: skip
  assert len(places) == 5
  twice = DATA["digit_grid"](side=3, digits=2, copies=2)
  assert len(twice.source("train")) == len(data.source("train"))
  held = [twice.prepare(e)["image"].tobytes() for e in twice.source("test")]
  assert len(set(held)) == len(held) == 2 * len(data.source("test"))
  with pytest.raises(ValueError, match="copies=0"):
    DATA["digit_grid"](side=3, digits=2, copies=0)
  with pytest.raises(ValueError, match="digits=10"):
    DATA["digit_grid"](side=3, digits=10)


def test_folder_of_images(tmp_path):
  data = dict(
    name="folder_images", path=str(folder(tmp_path)), num_classes=3, size=8,
    crop="resized", layers=2,
  )  # fmt: skip
  batch = next(batches(data))
  assert batch["image"].shape == (8, 8, 8, 3) and set(batch["label"]) <= {
    0,
    1,
    2,
  }
  built = config_lib.load(tiny.config(data=data)).data
  whole = pipeline.heldout_arrays(built)
  red = whole["image"][..., 0] * 0.229 + 0.485
  expected = np.broadcast_to(
    (80 * whole["label"] / 255)[:, None, None], red.shape
  )
  np.testing.assert_allclose(red, expected, atol=0.01)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(path="nowhere"), "no such folder"),
    (dict(num_classes=4), "has 3 class folders; data.num_classes is 4"),
  ],
)
def test_folder_errors(change, message, tmp_path):
  options = dict(path=str(folder(tmp_path)), num_classes=3) | change
  with pytest.raises(DataError, match=message):
    DATA["folder_images"](**options).source("train")


def test_broken_image_is_named(tmp_path):
  path = folder(tmp_path) / "train" / "class0" / "0.png"
  path.write_bytes(b"none")
  source = DATA["folder_images"](path=str(tmp_path), num_classes=3).source(
    "train"
  )
  with pytest.raises(DataError, match="0.png"):
    for i in range(len(source)):
      source[i]


@pytest.mark.parametrize("index", range(len(randaugment.OPERATIONS)))
def test_every_operation_keeps_the_size(index):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
  for strength in (-1.0, 0.0, 0.5, 1.0):
    out = randaugment.OPERATIONS[index](image, strength)
    assert out.size == image.size and out.mode == "RGB"


def test_rand_augment_follows_its_generator():
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))

  def run(seed):
    return np.asarray(
      randaugment.rand_augment(image, 2, 9.0, np.random.default_rng(seed))
    )

  assert all(np.array_equal(run(s), run(s)) for s in range(5))
  assert len({run(s).tobytes() for s in range(20)}) > 5


def test_centre_and_random_crops():
  image = Image.new("RGB", (30, 20))
  for x in range(30):
    for y in range(20):
      image.putpixel((x, y), (x * 8, y * 12, 0))
  middle = np.asarray(images_lib.centre(image, 10, 2.0))
  np.testing.assert_array_equal(
    middle[..., 0], [[8 * x for x in range(10, 20)]] * 10
  )
  areas = set()
  for seed in range(20):
    rng = np.random.default_rng(seed)
    crop = np.asarray(images_lib.random_resized_crop(image, 10, 0.1, rng))
    areas.add((int(crop[..., 0].min()), int(crop[..., 0].max())))
    assert crop.shape == (10, 10, 3)
  assert len(areas) > 10


def test_text_windows_are_the_corpus():
  data = DATA["standard_library"](length=50)
  corpus, source = data.corpus("test"), data.source("test")
  for i in (0, 3, len(source) - 1):
    tokens = data.prepare(source[i])["tokens"]
    np.testing.assert_array_equal(tokens, corpus[50 * i : 50 * i + 51])
  rng = np.random.default_rng(0)
  for _ in range(100):
    assert data.augment(source[len(source) - 1], rng)["tokens"].shape == (51,)
  assert data.corpus("train").max() < text_lib.VOCABULARY


def test_folder_of_text(tmp_path):
  for i in range(40):
    (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * 3)
  data = DATA["folder_text"](path=str(tmp_path), length=8)
  assert bytes(data.corpus("test")).startswith(b"document 0 document 0")
  assert bytes(data.corpus("test")).count(b"\0") == 2
  assert bytes(data.corpus("train")).count(b"\0") == 38
  with pytest.raises(DataError, match="0 files match"):
    DATA["folder_text"](path=str(tmp_path), patterns=("*.md",)).corpus("train")


class Tiny(tfds.core.GeneratorBasedBuilder):
  """A builder that can be prepared without TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Tensor(shape=(6, 6, 3), dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=2),
        "text": tfds.features.Text(),
      }
    )
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(30),
      "test": self._generate_examples(9),
    }

  def _generate_examples(self, count):
    for i in range(count):
      image = np.full((6, 6, 3), 8 * i, np.uint8)
      yield i, {"image": image, "label": i % 2, "text": f"text {i}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data_dir in which the builder above was really written and is read."""
  where = str(tmp_path_factory.mktemp("tfds"))
  tfds_source.prepare("tiny", where)
  return where


@pytest.mark.filterwarnings("ignore")
def test_builder_is_prepared_and_read_without_tensorflow(prepared):
  import sys

  data = DATA["tfds_images"](
    builder="tiny", data_dir=prepared, test="test", num_classes=2, size=6,
    mean=(0.0,) * 3, std=(1.0,) * 3, eval_zoom=1.0,
  )  # fmt: skip
  assert len(data.source("train")) == 30
  found = pipeline.heldout_arrays(data)
  values = np.sort(np.round(found["image"][:, 0, 0, 0] * 255))
  np.testing.assert_array_equal(values, 8 * np.arange(9))
  assert "tensorflow" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_text_builder(prepared, tmp_path):
  data = DATA["tfds_text"](
    builder="tiny", data_dir=prepared, length=4, cache=str(tmp_path)
  )
  text = bytes(data.corpus("test"))
  assert sorted(text.split(b"\0")[:-1]) == sorted(
    b"text %d" % i for i in range(9)
  )
  (cached,) = tmp_path.iterdir()
  assert bytes(data.corpus("test")) == cached.read_bytes()


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(builder="tinyy"), "not found"),
    (dict(builder="tiny", test="dev"), "split 'dev' cannot be read"),
    (dict(builder="tiny", test="test", label_key="y"), "no feature 'y'"),
  ],
)
@pytest.mark.filterwarnings("ignore")
def test_builder_errors(options, message, prepared):
  with pytest.raises(DataError, match=message):
    DATA["tfds_images"](data_dir=prepared, **options).source("test")
