import pathlib
import subprocess
import sys

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


def noise(path: pathlib.Path, seed: int) -> pathlib.Path:
  """A file with random pixels."""
  rng = np.random.default_rng(seed)
  path.parent.mkdir(exist_ok=True)
  Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).save(path)
  return path


def test_images_of_one_name_are_drawn_into_two_files(tmp_path):
  paths = [
    noise(tmp_path / "a" / "ok.png", 0), noise(tmp_path / "b" / "ok.jpg", 1),
  ]  # fmt: skip
  written = pictures.main(
    "stride", tmp_path / "out", images=paths, keep=0.5, blocks=(1,), size=32
  )
  assert [path.name for path in written] == [
    "ok_stride.png", "ok-2_stride.png",
  ]  # fmt: skip
  first, second = (np.asarray(Image.open(path)) for path in written)
  assert (first != second).any()


def test_names_do_not_meet_those_of_other_images(tmp_path):
  paths = [
    noise(tmp_path / name, i)
    for i, name in enumerate(["ok.png", "ok.jpg", "ok-2.png", "ok.bmp"])
  ]
  assert list(pictures.photographs(paths)) == ["ok", "ok-3", "ok-2", "ok-4"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"recipe": "tomee"}, "did you mean tome"),
    ({"keep": 0.0}, "keep=0.0"),
    ({"keep": float("nan")}, "keep=nan"),
    ({"size": 0}, "size=0"),
    ({"patch": -1}, "patch=-1"),
    ({"size": 65}, "multiple of"),
    ({"images": [__file__]}, "is no image"),
    ({"out": __file__}, "out=.*must be a directory"),
    ({"out": ""}, "out='': must be a directory"),
  ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, changes, message):
  settings = {"recipe": "tome", "out": tmp_path, "size": 32, **changes}
  with pytest.raises(ValueError, match=message):
    pictures.main(**settings)


def test_the_command_answers_in_one_line(tmp_path):
  command = [sys.executable, "-m", "experiments.pictures", "--recipe", "tome"]
  done = subprocess.run(
    [*command, "--image", "absent.png", "--out", str(tmp_path), "--size=32"],
    cwd=pathlib.Path(__file__).resolve().parents[2], text=True,
    capture_output=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith("error: ")
  assert "absent.png" in done.stderr and "Traceback" not in done.stderr
