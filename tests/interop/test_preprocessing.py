"""Preprocessing is read from both layouts and does what they do."""

import numpy as np
import pytest
from PIL import Image

from tests.interop.helpers import config, random_params
from tokjax import interop
from tokjax.interop.preprocessing_files import from_hf, to_hf
from tokjax.interop.preprocessing_timm import from_timm

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
NORMAL = {"image_mean": MEAN, "image_std": STD, "do_normalize": True}

HF = {
  "vit, number": (
    {"size": 224, "resample": 2, **NORMAL},
    (224, "bilinear", 1.0, False),
  ),
  "deit": (
    {
      "size": 256,
      "crop_size": 224,
      "do_center_crop": True,
      "resample": 3,
      "feature_extractor_type": "DeiTFeatureExtractor",
      **NORMAL,
    },
    (224, "bicubic", 0.875, False),
  ),
  "clip, number": (
    {
      "size": 224,
      "crop_size": 224,
      "feature_extractor_type": "CLIPFeatureExtractor",
      "resample": 3,
      **NORMAL,
    },
    (224, "bicubic", 1.0, True),
  ),
  "clip": (
    {
      "size": {"shortest_edge": 256},
      "crop_size": {"height": 224, "width": 224},
      "do_center_crop": True,
      "image_processor_type": "CLIPImageProcessor",
      "resample": 1,
      **NORMAL,
    },
    (224, "lanczos", 0.875, True),
  ),
  "no crop": (
    {
      "size": {"height": 64, "width": 64},
      "crop_size": 32,
      "do_center_crop": False,
      **NORMAL,
    },
    (64, "bilinear", 1.0, False),
  ),
}


def photograph():
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)
  return np.asarray(Image.fromarray(small).resize((140, 90)))


@pytest.mark.parametrize("name", HF)
def test_reads_files_of_transformers(name):
  whole, expected = HF[name]
  value = from_hf(whole)
  assert expected == (
    value.image_size,
    value.interpolation,
    value.crop_fraction,
    value.keep_aspect,
  )
  assert value.mean == tuple(MEAN)
  assert from_hf(to_hf(value)) == value


@pytest.mark.parametrize("name", HF)
def test_images_equal_those_of_transformers(name):
  pytest.importorskip("torch", reason="transformers' processors need torch")
  clip = pytest.importorskip(
    "transformers.models.clip.image_processing_pil_clip",
    reason="this transformers has no processor that uses Pillow",
  )
  value = from_hf(HF[name][0])
  whole = {k: v for k, v in to_hf(value).items() if not k.startswith("image_p")}
  theirs = clip.CLIPImageProcessorPil(**whole)
  image = Image.fromarray(photograph())
  expected = theirs(images=image, return_tensors="np")["pixel_values"][0]
  ours = value(image)
  assert ours.shape == (value.image_size, value.image_size, 3)
  np.testing.assert_allclose(
    ours, np.asarray(expected).transpose(1, 2, 0), rtol=0, atol=1e-5
  )


def test_reads_timm():
  value = from_timm(
    {
      "mean": MEAN,
      "std": STD,
      "input_size": [3, 224, 224],
      "interpolation": "bicubic",
      "crop_pct": 0.9,
    }
  )
  assert value.resize_to == 248
  assert value(photograph()).shape == (224, 224, 3)


LAYOUTS = {"ViTForImageClassification": "floor", "timm": "half_even"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_travels_with_the_checkpoint(layout, tmp_path):
  value = interop.Preprocessing(
    mean=tuple(MEAN),
    std=tuple(STD),
    image_size=32,
    crop_fraction=0.8,
    crop_rounding=LAYOUTS[layout],
  )
  interop.save(
    tmp_path,
    config(),
    random_params(config()),
    layout=layout,
    preprocessing=value,
  )
  assert interop.load(tmp_path)[2] == value


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"do_resize": False}, "do_resize=False is not supported"),
    ({"rescale_factor": 1.0}, "rescale_factor=1.0 is not supported"),
    ({"size": {"height": 32}}, "size=.*must be a number or height and width"),
  ],
)
def test_requests_that_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    from_hf({"size": 32, **NORMAL, **changes})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_crops_that_a_layout_rounds_otherwise_are_not_written(layout, tmp_path):
  other = {"floor": "half_even", "half_even": "floor"}[LAYOUTS[layout]]
  value = interop.Preprocessing(
    (0.5,) * 3, (0.5,) * 3, 32, crop_rounding=other
  )
  message = f"crop_rounding='{other}' cannot be written"
  with pytest.raises(ValueError, match=message):
    interop.save(
      tmp_path / "new",
      config(),
      random_params(config()),
      layout=layout,
      preprocessing=value,
    )
  assert not (tmp_path / "new").exists()
  with pytest.raises(ValueError, match="interpolation='cubic'"):
    interop.Preprocessing((0.5,), (0.5,), 32, interpolation="cubic")
