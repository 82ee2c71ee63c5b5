"""Generation and pictures of prompts with images."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

from experiments import generate, image_prompts, pictures
from experiments.sweeps.language_models import Pretrained
from experiments.training.config import Recipe
from tests.contract.case import draw_params
from tests.interop import test_llava
from tests.interop.language_references import transformers
from tokjax import interop
from tokjax.models import Sampler, VisionLanguage, VisionLanguageGenerator

WORDS = {"<unk>": 0, "<s>": 1, "what": 2, "is": 3, "this": 4, "?": 5}
FEW = dict(tokens=4, capacity=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A LLaVA of random weights, with a tokenizer and preprocessing."""
  made = tmp_path_factory.mktemp("llava")
  test_llava.make().save_pretrained(made)
  transformers.models.llava.LlavaImageProcessorPil(
    size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
  ).save_pretrained(made)
  others = {f"w{i}": i for i in range(6, 60) if i != test_llava.IMAGE}
  level = tokenizers.models.WordLevel(
    {**WORDS, **others, "<image>": test_llava.IMAGE}, unk_token="<unk>"
  )
  whole = tokenizers.Tokenizer(level)
  whole.add_special_tokens(["<image>"])
  whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  whole.save(str(made / "tokenizer.json"))
  return made


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
  """One whose encoder has no class token."""
  made = tmp_path_factory.mktemp("siglip")
  test_llava.make(**test_llava.CASES["siglip-full"]).save_pretrained(made)
  return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Two images of different sizes."""
  where = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for name, shape in (("a.png", (20, 30, 3)), ("b.png", (24, 12, 3))):
    pixels = rng.integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(where / name)
  return [where / "a.png", where / "b.png"]


def config(folder, recipe="none", keep=None, **changes):
  return generate.Generate(
    Pretrained(str(folder)), Recipe(recipe, keep), **{**FEW, **changes}
  )


@pytest.mark.parametrize("recipe", ["none", "divprune"])
def test_it_streams_what_the_generator_says(folder, files, tmp_path, recipe):
  said = []
  keep = None if recipe == "none" else 0.3
  out = generate.main(
    config(folder, recipe, keep), tmp_path, "what is <image> and <image> ?",
    said.append, images=files,
  )  # fmt: skip
  lm = image_prompts.load(folder)
  slots = Recipe(recipe, keep).slots()
  made = VisionLanguageGenerator(lm.build(slots), lm.params, 64, 4)
  pixels = [lm.preprocessing(Image.open(path)) for path in files]
  ids = [2, 3, test_llava.IMAGE, 0, test_llava.IMAGE, 5]
  assert list(out.ids) == made.generate([ids], [pixels])[0]
  assert out.read == len(ids) - 2 + 2 * made.image_tokens
  assert "".join(said).startswith(out.text)
  assert "time to first token" in said[-1] and "full cache" in said[-1]
  size = made.bytes(made.prefill([ids], [pixels]))
  assert out.physical == size.physical
  assert (out.physical < out.full) == (recipe == "divprune")
  if recipe == "none":
    assert out.physical == out.full


def test_a_draft_says_what_the_model_says(folder, files, tmp_path, monkeypatch):
  """FLASH at random: the text is the same, and steps are counted."""
  lm, recipe = image_prompts.load(folder), Recipe("flash", options={"ahead": 2})
  with pytest.raises(ValueError, match="flash"):
    lm.build(recipe.slots())  # Its weights are not in the folder.
  shapes = jax.eval_shape(
    VisionLanguage(lm.config, recipe.slots()).init, jax.random.key(0),
    interop.model_shapes.specimen(lm.config)[1],
  )["params"]  # fmt: skip
  draft = draw_params(shapes["language"]["draft"])
  language = {**lm.params["language"], "draft": draft}
  own = dataclasses.replace(lm, params={**lm.params, "language": language})
  monkeypatch.setattr(image_prompts, "load", lambda source: own)
  given, said = dict(prompt="what is this ?", images=files[:1]), []
  plain = generate.main(config(folder), tmp_path, **given, show=said.append)
  fast = dataclasses.replace(config(folder), recipe=recipe)
  out = generate.main(fast, tmp_path, **given, show=said.append)
  assert out.ids == plain.ids and plain.per_step is None
  assert 1 <= out.per_step <= 3 and " a step" in said[-1]
  assert json.loads(out.record("", ""))["tokens_per_step"] == out.per_step
  hot = dataclasses.replace(fast, sampler=Sampler(temperature=0.5))
  with pytest.raises(ValueError, match="temperature=0.5: recipe 'flash'"):
    generate.main(hot, tmp_path, **given)


def test_images_stand_in_front_of_a_prompt_that_places_none(folder):
  lm, image = image_prompts.load(folder), test_llava.IMAGE
  assert lm.encode("what is this ?", 2) == [image, image, 2, 3, 4, 5]


@pytest.mark.parametrize(
  "prompt, images, changes, message",
  [
    ("<image> and <image> ?", 1, {}, "2 placeholders <image> for 1 images"),
    ("<image> ?", 2, {}, "1 placeholders <image> for 2 images"),
    ("what ?", 2, dict(capacity=8), "the capacity is 8"),
  ],
)
def test_prompts_that_do_not_fit(
  folder, files, tmp_path, prompt, images, changes, message
):
  with pytest.raises(ValueError, match=message):
    generate.main(
      config(folder, **changes), tmp_path, prompt, images=files[:images]
    )


def test_a_recipe_that_asks_a_class_token(siglip):
  """Refused when the model is built."""
  model, params, _ = interop.load(siglip)
  loaded = image_prompts.ImageModel(
    model.config, params, model.dtype, None, None, "siglip"
  )
  for recipe in ("visionzip", "fastervlm"):
    with pytest.raises(ValueError, match=f"{recipe}.*class"):
      loaded.build(Recipe(recipe, 0.5).slots())


def test_one_line_on_the_command_line(folder, files, tmp_path):
  broken = tmp_path / "broken.png"
  broken.write_bytes(files[0].read_bytes()[:40])
  run = subprocess.run(
    [sys.executable, "-m", "experiments.generate", "--model", str(folder)]
    + ["--image", str(broken), "--prompt", "what ?"]
    + ["--workdir", str(tmp_path / "run")],
    capture_output=True, text=True,
  )  # fmt: skip
  lines = [line for line in run.stderr.splitlines() if "error:" in line]
  assert run.returncode != 0 and len(lines) == 1 and not run.stdout
  assert "broken.png" in lines[0] and "no image" in lines[0]
  assert "Traceback" not in run.stderr


def test_checkpoints_that_take_no_prompts_with_images(siglip, tmp_path, files):
  with pytest.raises(ValueError, match="the folder has no tokenizer"):
    generate.main(config(siglip), tmp_path, "what ?", images=files)
  with pytest.raises(ValueError, match="image and prompts"):
    generate.main(
      config(siglip), tmp_path, prompts="questions.txt", images=files
    )


def test_a_line_of_json(folder, files, tmp_path):
  said = []
  generate.main(
    config(folder), tmp_path, "what ?", said.append, images=files[:1],
    as_json=True,
  )  # fmt: skip
  (line,) = said
  found = json.loads(line)
  assert found["prompt"] == "what ?" and found["prompt_tokens"] == 9 + 2
  assert found["cache_bytes"]["allocated"] == found["cache_bytes"]["full"]


def test_pictures_of_a_prompt(folder, files, tmp_path):
  """A file for each image; what cannot be drawn is refused."""
  draw = lambda **changes: pictures.from_command_line(
    pictures_given(out=str(tmp_path), checkpoint=str(folder), **changes)
  )
  draw(image=[str(path) for path in files], recipe="divprune")
  for name in ("a_divprune.png", "b_divprune.png"):
    with Image.open(tmp_path / name) as image:
      assert min(image.size) > 200
  with pytest.raises(ValueError, match="give at least one file"):
    draw(recipe="divprune")
  with pytest.raises(ValueError, match="every stage is shown"):
    draw(recipe="divprune", block=[1])


def pictures_given(**changes):
  """Options of the command."""
  plain = dict(
    image=None, prompt="what is this ?", keep=0.4, block=None, size=384,
    patch=16,
  )  # fmt: skip
  return type("Given", (), {**plain, **changes})
