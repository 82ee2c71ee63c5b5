import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import pictures
from tokjax import interop, recipes
from tokjax.analysis import merge_map
from tokjax.models import ViT, ViTConfig


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


@pytest.mark.parametrize("recipe", ["tome", "downsample"])
def test_images_of_another_size_than_the_configured_one(tmp_path, recipe):
  """As DINOv2 has it: a table for 518 pixels, images of 224."""
  config = ViTConfig(
    image_size=24, patch_size=4, width=16, depth=2, heads=2, mlp_dim=32,
    layer_scale=True, num_classes=None,
  )  # fmt: skip
  init = jax.jit(ViT(config).init)
  params = init(jax.random.key(0), np.zeros((1, 24, 24, 3)))["params"]
  how = interop.Preprocessing((0.5,) * 3, (0.5,) * 3, 16)
  folder = tmp_path / "dino"
  interop.save(
    folder, config, params, layout="Dinov2Model", preprocessing=how
  )
  (path,) = pictures.main(
    recipe, tmp_path / "out", images=[noise(tmp_path / "a" / "n.png", 0)],
    checkpoint=str(folder), keep=0.5,
  )  # fmt: skip
  assert np.asarray(Image.open(path)).shape[1] > 3 * 16
  model, params, _ = interop.load(folder, slots=recipes.get(recipe, keep=0.5))
  images = np.random.default_rng(0).normal(size=(1, 16, 16, 3))
  (*_, last) = merge_map.look(
    model, params, jnp.asarray(images, jnp.float32), jax.random.key(0)
  )
  # 4 x 4 patches, not 6 x 6, and 8 or 9 tokens of them.
  assert last.index.shape == (1, 4, 4) and last.num_tokens[0] in (8, 9)


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
