"""Questions about images: their words, answers, and how a model is asked."""

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from configs import vlm_grid
from experiments.data import DataError, digit_grid, pipeline
from experiments.data.grid_captions import GridCaptions
from experiments.data.grid_questions import KINDS, GridQuestions
from experiments.data.grid_scenes import COLOURS
from experiments.data.questions import NOTHING, Question, conversation
from experiments.data.words import END, IMAGE, START, Words
from experiments.tasks import Questions
from experiments.training import config as config_lib
from tests.multimodal import vlm_models
from tokjax import recipes
from tokjax.models import VisionLanguageGenerator, ViTConfig
from tokjax.tokens import Kind

DATA = GridQuestions(side=3, digits=6, turns=2, heldout=30)


def test_words_are_ids_and_back():
  words = Words(("is", "2", "?"))
  ids = words.encode("<image> Is 2?")
  assert ids == [START, IMAGE, 4, 5, 6]
  assert words.decode([*ids, END]) == "is 2 ?"
  with pytest.raises(ValueError, match="'three' is no word of this model"):
    words.encode("is three?")


def test_a_conversation_expects_answers_and_ends():
  words = Words(("how", "many", "?", "2", "3"))
  asked = [Question("how many?", x, "count") for x in ("2", "3")]
  image = np.zeros((2, 2, 1))
  found = conversation(words, image, asked, 14)
  assert found["length"] == 12
  tokens, target = found["tokens"].tolist(), found["target"].tolist()
  assert tokens == [START, IMAGE, 4, 5, 6, 7, END, 4, 5, 6, 8, END, 0, 0]
  no = NOTHING
  assert target == [no] * 4 + [7, END] + [no] * 3 + [8, END] + [no] * 3
  heldout = conversation(words, image, asked, 14, held=True)
  assert heldout["tokens"].tolist() == [*tokens[:10], 0, 0, 0, 0]
  expected = [no] * 4 + [7] + [no] * 4 + [8] + [no] * 4
  assert heldout["target"].tolist() == expected
  assert heldout["length"] == 10
  with pytest.raises(ValueError, match="length=11"):
    conversation(words, image, asked, 11)


def shown(image: np.ndarray) -> np.ndarray:
  """The digit in each cell by its pixels, -1 where it is none, `[9]`."""
  pixels, labels = digit_grid.flat("test")
  cells = (image[..., 0] * 20 + 5).reshape(3, 8, 3, 8).swapaxes(1, 2)
  apart = np.abs(cells.reshape(9, 1, 64) - pixels).max(axis=-1)
  return np.where(apart.min(axis=1) < 1e-3, labels[apart.argmin(axis=1)], -1)


def test_answers_follow_from_the_pixels():
  kinds = []
  for number in range(30):
    image, question = DATA.question(number)
    digits, words = shown(image), question.text.rstrip("?").split()
    assert (digits >= 0).sum() == 6
    kinds.append(question.kind)
    if question.kind == "cell":
      ground = (image[..., 1:].reshape(3, 8, 3, 8, 2) * 20 + 5).mean((1, 3))
      wanted = np.abs(ground - COLOURS[words[-1]]).max(axis=-1) < 1e-3
      (cell,) = np.flatnonzero(wanted)
      assert question.answer == str(digits[cell])
      named = question.named((6, 6)).reshape(3, 2, 3, 2)
      assert named.sum() == 4 and named[cell // 3, :, cell % 3].all()
    elif question.kind == "count":
      assert question.answer == str((digits == int(words[-1])).sum())
    else:
      assert question.answer == str(digits.max())
    again = DATA.question(number)
    assert again[1] == question and np.array_equal(again[0], image)
  assert kinds == list(KINDS) * 10


def test_an_example_has_all_turns_and_other_images_every_time():
  example = DATA.source("train")[0]
  draw = lambda seed: DATA.augment(example, np.random.default_rng(seed))
  one, two = draw(0), draw(1)
  assert (one["target"] >= 0).sum() == 4 and one["tokens"].shape == (16,)
  assert not np.array_equal(one["image"], two["image"])
  assert np.array_equal(draw(0)["image"], one["image"])


@pytest.mark.parametrize("side, digits", [(0, 5), (3, 4), (3, 10)])
def test_impossible_grids_are_refused(side, digits):
  with pytest.raises(ValueError, match="side=|digits="):
    GridQuestions(side=side, digits=digits)


def small():
  """A model of random weights for images of 24 x 24 pixels."""
  vision = dataclasses.replace(
    vlm_models.VISION, image_size=24, patch_size=8, channels=3, depth=1
  )
  assert isinstance(vision, ViTConfig)
  return vlm_models.config(vision=vision, image_token=IMAGE, pass_class=True)


@pytest.mark.parametrize("recipe", ["none", "avgpool_visual", "fastv"])
def test_the_task_asks_as_the_generator_does(recipe):
  """Also where recipes leave fewer tokens before or inside of the decoder."""
  keep = {} if recipe == "none" else {"keep": 0.5}
  config = small()
  model = vlm_models.VisionLanguage(config, recipes.get(recipe, **keep))
  params = vlm_models.params_of(config)
  batch = pipeline.heldout_arrays(DATA, 3)
  asked = [DATA.question(i) for i in range(3)]
  prompts = [DATA.words.encode(question.prompt) for _, question in asked]
  task = Questions()
  inputs = task.inputs(batch, model)
  run = jax.jit(lambda p, x: model.apply({"params": p}, x)[0])
  logits = np.asarray(task.answers(run(params, inputs), batch))
  assert logits.shape[:2] == batch["tokens"].shape
  generator = VisionLanguageGenerator(
    model, params, 64, 1, buckets=(64,), image_buckets=(1, 3)
  )
  images = [[image.astype(np.float32)] for image, _ in asked]
  going = generator.prefill(prompts, images)
  count = generator.image_tokens
  assert (inputs.kind == Kind.VISUAL).sum(axis=1).tolist() == [count] * 3
  for row, prompt, wanted in zip(logits, prompts, going.logits, strict=True):
    np.testing.assert_allclose(row[len(prompt) - 1], wanted, atol=2e-5)


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A stand-in for the package easy-vqa, of four pictures."""
  from experiments.data import easy_vqa

  def questions():
    texts = ["what color is the shape?", "is there a circle?"] * 4
    answers = ["red", "no", "blue", "yes"] * 2
    return texts, answers, [0, 0, 1, 1, 2, 2, 3, 3]

  def paths():
    found = {}
    for i in range(4):
      found[i] = str(tmp_path / f"{i}.png")
      Image.new("RGB", (64, 64), (0, 85 * i, 255)).save(found[i])
    return found

  made = types.SimpleNamespace(
    get_train_questions=questions, get_test_questions=questions,
    get_train_image_paths=paths, get_test_image_paths=paths,
  )  # fmt: skip
  monkeypatch.setitem(sys.modules, "easy_vqa", made)
  for cached in (easy_vqa.package, easy_vqa.load):
    cached.cache_clear()
  yield easy_vqa
  for cached in (easy_vqa.package, easy_vqa.load):
    cached.cache_clear()


def test_easy_vqa_asks_about_its_pictures(package):
  data = package.EasyVqa(turns=2, heldout=4)
  image, question = data.question(1)
  assert image.shape == (64, 64, 3)
  np.testing.assert_allclose(image[0, 0] * 0.25 + 0.9, [0, 1 / 3, 1], atol=1e-6)
  assert (question.answer, question.kind) == ("blue", "colour")
  made = data.augment({"number": 3}, np.random.default_rng(0))
  text = data.words.decode(made["tokens"].tolist())
  assert "color" in text and "circle" in text
  answers = {data.words.decode([i]) for i in made["target"] if i > END}
  assert answers == {"blue", "yes"}
  assert made["tokens"].shape == (data.length,)
  assert len(data.source("train")) == len(data.source("test")) == 4
  config = config_lib.load(vlm_grid.get_config("data=easy_vqa,runlocal"))
  assert config.model.vision.num_patches == 64


def test_without_easy_vqa_one_line_says_what_to_install(package, monkeypatch):
  monkeypatch.setitem(sys.modules, "easy_vqa", None)
  package.package.cache_clear()
  with pytest.raises(DataError, match="tokjax\\[easyvqa\\]") as found:
    package.EasyVqa().source("train")
  assert "\n" not in str(found.value)


def test_captions_read_what_cells_show():
  data = GridCaptions(side=3, digits=6, heldout=4)
  example = data.prepare(data.source("test")[2])
  image, ids = data.caption(2)
  np.testing.assert_array_equal(example["image"], image)
  words = data.words.decode(ids).split()
  scene = data._heldout(2)
  shown = [str(x) if x >= 0 else "?" for x in scene.label.ravel()]
  assert words == shown and words.count("?") == 3
  # Each id but the last is told the next one, from the image on.
  assert example["length"] == data.length == len(example["tokens"]) == 12
  np.testing.assert_array_equal(example["target"][1:-1], example["tokens"][2:])
  assert example["target"][0] == example["target"][-1] == -1
  with pytest.raises(TypeError, match="turns"):
    GridCaptions(turns=2)
