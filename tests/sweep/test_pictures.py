import numpy as np
import pytest
from PIL import Image

from experiments import pictures


def test_draws_an_image_block_by_block(tmp_path):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (50, 70, 3)).astype(np.uint8)
  Image.fromarray(image).save(tmp_path / "noise.png")
  (path,) = pictures.main(
    "tome", tmp_path / "out", images=[tmp_path / "noise.png"], keep=0.4,
    blocks=(1, 12), size=64,
  )  # fmt: skip
  assert path == tmp_path / "out" / "noise_tome.png"
  shown = np.asarray(Image.open(path).convert("RGB"))
  assert shown.shape[1] > 3 * 64


def test_the_sample_photographs_are_the_default():
  assert sorted(pictures.sample_photographs()) == ["china", "flower"]


def test_a_block_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(ValueError, match="13"):
    pictures.main("tome", tmp_path, blocks=(13,), size=64)
