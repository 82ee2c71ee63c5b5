"""Images of every mode, dtype and orientation, and timm's own transforms."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from experiments.data import images as data_images
from experiments.data.errors import DataError
from tokjax.interop import Preprocessing
from tokjax.interop.images import to_pillow
from tokjax.interop.preprocessing_files import from_hf, read
from tokjax.interop.preprocessing_timm import from_timm

HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def file_of(image, kind, **options):
  """An image as it comes back from a file."""
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return Image.open(io.BytesIO(buffer.getvalue()))


def test_what_is_8_bit_rgb_stays_as_it_is():
  image = Image.fromarray(RGB)
  assert to_pillow(image) is image
  np.testing.assert_array_equal(np.asarray(to_pillow(RGB)), RGB)
  grey = RGB[..., 0]
  expected = np.repeat(grey[..., None], 3, axis=-1)
  for value in (grey, grey[..., None], Image.fromarray(grey)):
    np.testing.assert_array_equal(np.asarray(to_pillow(value)), expected)
    np.testing.assert_array_equal(np.asarray(to_pillow(value, 1)), grey)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind):
  deep = (np.arange(60, dtype=np.uint16) * 1111).reshape(6, 10)
  read = file_of(Image.fromarray(deep), kind)
  expected = np.round(deep / 257).astype(np.uint8)
  assert 100 < expected.mean() < 160
  for value in (read, Image.fromarray(deep), deep, deep[..., None]):
    np.testing.assert_array_equal(np.asarray(to_pillow(value, 1)), expected)
    blue = np.asarray(to_pillow(value))[..., 2]
    np.testing.assert_array_equal(blue, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation):
  # What the camera stored, for an upright image of RGB.
  stored = {
    1: RGB,
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.transpose(1, 0, 2),
    6: np.rot90(RGB),
    7: RGB[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(RGB, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = Image.fromarray(np.ascontiguousarray(stored))
  upright = to_pillow(file_of(image, "PNG", exif=exif))
  np.testing.assert_array_equal(np.asarray(upright), RGB)
  # Not once more.
  np.testing.assert_array_equal(np.asarray(to_pillow(upright)), RGB)


def test_transparency_is_put_on_white():
  alpha = np.array([[0, 255, 51]], np.uint8)
  colour = np.array([[[9, 0, 0], [10, 20, 30], [0, 100, 255]]], np.uint8)
  rgba = np.concatenate([colour, alpha[..., None]], axis=-1)
  share = alpha[..., None] / 255
  expected = np.round(colour * share + 255 * (1 - share))
  image = Image.fromarray(rgba)
  for value in (rgba, image, file_of(image, "PNG")):
    np.testing.assert_array_equal(np.asarray(to_pillow(value)), expected)
  palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
  palette.putpalette([5, 6, 7, 8, 9, 10])
  read = file_of(palette, "PNG", transparency=0)
  expected = [[[255, 255, 255], [8, 9, 10]]]
  np.testing.assert_array_equal(np.asarray(to_pillow(read)), expected)


@pytest.mark.parametrize(
  "value, message",
  [
    (RGB.astype(np.float32), "dtype float32: must be uint8"),
    (RGB.astype(np.int64), "dtype int64: must be uint8"),
    (RGB > 9, "dtype bool: must be uint8"),
    (RGB.transpose(2, 0, 1), r"\(3, 6, 9\).*channels are first"),
    (RGB[None], r"\(1, 6, 9, 3\): must be \[height, width\]"),
    (RGB[..., :2], r"\(6, 9, 2\)"),
    (RGB[0, 0], r"\(3,\)"),
    (RGB[:0], "0 pixels: is empty"),
    (Image.new("I", (2, 2)), "mode 'I': 32-bit values"),
    (Image.new("F", (2, 2)), "mode 'F': 32-bit values"),
  ],
)
def test_what_is_not_known_is_refused(value, message):
  how = Preprocessing(**HALF, image_size=4)
  with pytest.raises(ValueError, match=message):
    how(value)
  with pytest.raises(DataError, match=message):
    data_images.to_image(value)


def test_files_of_a_folder_are_read_likewise(tmp_path):
  deep = Image.fromarray(np.full((8, 8), 32896, np.uint16))
  for name, image in (("0", deep), ("1", Image.new("F", (8, 8)))):
    (tmp_path / "train" / name).mkdir(parents=True)
    image.save(tmp_path / "train" / name / "x.tiff")
    (tmp_path / "train" / name / "x.tiff").rename(
      tmp_path / "train" / name / "x.png"
    )
  source = data_images.FolderImages(path=str(tmp_path), num_classes=2)
  files = source.source("train")
  labels = [label for _, label in files.files]
  image = files[labels.index(0)]["image"]
  assert np.asarray(image).tolist() == np.full((8, 8, 3), 128).tolist()
  with pytest.raises(DataError, match=r"1.x\.png: image of mode 'F'"):
    files[labels.index(1)]


TIMM = dict(
  mean=[0.5] * 3,
  std=[0.5] * 3,
  input_size=[3, 224, 224],
  interpolation="bicubic",
  crop_pct=0.9,
)


def test_centre_crop_of_timm_rounds_half_to_even():
  # 640 x 427 is resized to 371 x 248; 73.5 columns stay on each side.
  image = np.zeros((427, 640, 3), np.uint8)
  image[:, :, 0] = np.linspace(0, 255, 640)[None]
  resized = Image.fromarray(image).resize((371, 248), Image.Resampling.BICUBIC)
  columns = np.asarray(resized)[12, :, 0] / np.float32(255) * 2 - 1
  row = from_timm(TIMM)(image)[0, :, 0]
  np.testing.assert_allclose(row, columns[74 : 74 + 224], rtol=0, atol=1e-6)
  floor = Preprocessing(**HALF, image_size=224, crop_fraction=0.9)
  row = floor(image)[0, :, 0]
  np.testing.assert_allclose(row, columns[73 : 73 + 224], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(crop_pct=0.875),
    dict(crop_pct=None),
    dict(crop_pct=1.0, crop_mode="squash"),
    dict(crop_pct=0.93, crop_mode="squash", interpolation="bilinear"),
    dict(input_size=[3, 64, 96], crop_pct=0.95),
    dict(input_size=[3, 96, 32], crop_pct=0.9, interpolation="lanczos"),
    dict(input_size=[3, 48, 80], crop_mode="squash", mean=None, std=None),
  ],
)
def test_images_equal_those_of_timm(changes):
  timm_data = pytest.importorskip(
    "timm.data",
    reason="timm (with torchvision) is not installed",
    exc_type=ImportError,
  )
  published = {**TIMM, **changes}
  config = timm_data.resolve_data_config(pretrained_cfg=published)
  ours = from_timm(published)
  theirs = timm_data.create_transform(**config, is_training=False)
  for height, width in ((427, 640), (301, 200), (99, 100)):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = theirs(Image.fromarray(pixels)).numpy().transpose(1, 2, 0)
    assert ours.sides == expected.shape[:2]
    np.testing.assert_allclose(ours(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("key, value", [
  ("crop_mode", "border"), ("interpolation", "random"), ("crop_pct", 1.1),
  ("std", [0.5, 0, 0.5]), ("mean", [0.5]), ("input_size", [224, 224]),
])  # fmt: skip
def test_what_timm_asks_for_and_we_do_not_is_named(key, value):
  name = {"crop_pct": "crop_fraction"}.get(key, key)
  with pytest.raises(ValueError, match=f"{name}="):
    from_timm({**TIMM, key: value})


@pytest.mark.parametrize("name", ["ViT", "DeiT", "CLIP", "Bit", "Siglip"])
def test_defaults_of_processors_are_those_of_transformers(name):
  pytest.importorskip("torch", reason="transformers' processors need torch")
  module = pytest.importorskip(
    f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}",
    reason="this transformers has no processor that uses Pillow",
  )
  theirs = getattr(module, f"{name}ImageProcessorPil")()
  ours = from_hf({"image_processor_type": f"{name}ImageProcessorFast"})
  pixels = RNG.integers(0, 256, (300, 451, 3), dtype=np.uint8)
  image = Image.fromarray(pixels)
  expected = theirs(images=image, return_tensors="np")["pixel_values"][0]
  np.testing.assert_allclose(
    ours(image), np.asarray(expected).transpose(1, 2, 0), rtol=0, atol=1e-5
  )


def test_one_mean_for_all_channels_and_the_processor_of_a_model():
  part = {"image_mean": 0.25, "image_std": 0.5, "size": [32, 48]}
  value = from_hf(part, "vit_mae")
  assert value.mean == (0.25,) * 3 and value.sides == (32, 48)
  assert from_hf({}, "dinov2").keep_aspect
  with pytest.raises(ValueError, match="model_type='siglip2'"):
    from_hf({}, "siglip2")
  with pytest.raises(ValueError, match="image_mean=.*of 1 channels"):
    from_hf({}, "vit", channels=1)


def test_the_one_file_of_a_processor_of_transformers_5(tmp_path):
  part = {"image_processor_type": "CLIPImageProcessor", "resample": 2}
  (tmp_path / "config.json").write_text("{}")
  whole = tmp_path / "processor_config.json"
  whole.write_text(json.dumps({"processor_class": "CLIPProcessor"}))
  assert read(tmp_path) is None
  whole.write_text(json.dumps({"image_processor": part}))
  assert read(tmp_path) == from_hf(part)
  whole.write_text(json.dumps({"image_processor": [part]}))
  with pytest.raises(ValueError, match=r"processor_config.json: image_proc.*="):
    read(tmp_path)
