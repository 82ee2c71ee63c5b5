"""Vision-language models that sweeps are run on, with questions to ask them."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from experiments import typed
from experiments.data.questions import Question
from experiments.sweeps.runs import trained_seeds
from experiments.training import config as config_lib
from tokjax import interop, zoo
from tokjax.models import VisionLanguage, VisionLanguageConfig
from tokjax.slots import Slots


class Asked(NamedTuple):
  """A question as a model takes it.

  Attributes:
    question: in words.
    prompt: ids, with one placeholder.
    image: prepared for the model.
  """

  question: Question
  prompt: Sequence[int]
  image: Any


@dataclasses.dataclass(frozen=True)
class QuestionModel:
  """A vision-language model to fill with recipes, and what it is asked.

  Attributes:
    config: its architecture.
    weights: its parameters, a set for each seed that it was trained with.
    dtype: of activations and caches.
    tokenizer: text to ids and back.
    asked: held-out questions.
    origin: where the weights come from, in words.
  """

  config: VisionLanguageConfig
  weights: tuple[Any, ...]
  dtype: Any
  tokenizer: Any
  asked: Sequence[Asked]
  origin: str

  def build(self, slots: Slots) -> VisionLanguage:
    """The model with these slots."""
    return VisionLanguage(self.config, slots, self.dtype)

  @property
  def params(self) -> Any:
    """The weights of the first seed, which are timed and drawn."""
    return self.weights[0]

  @property
  def kinds(self) -> tuple[str, ...]:
    """Sorts of questions, in the order in which they come first."""
    return tuple(dict.fromkeys(one.question.kind for one in self.asked))


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """Models trained here, or the finished runs in the sweep's workdir.

  Attributes:
    train: config of a run, on data with questions; its recipe is the one of
      training only.
    seeds: number of runs, with the config's seed and those after it. Accuracy
      is their mean.
    questions: how many held-out ones are asked; None: all.
  """

  train: config_lib.Config
  seeds: int = 1
  questions: int | None = None

  def __post_init__(self):
    if self.seeds < 1:
      raise ValueError(f"seeds={self.seeds}: must be 1 or more")
    if self.questions is not None and self.questions < 1:
      raise ValueError(f"questions={self.questions}: must be 1 or more")
    if not hasattr(self.train.data, "question"):
      raise ValueError(
        f"train.data: {type(self.train.data).__name__} has no questions about"
        " images"
      )

  def prepare(self, workdir: pathlib.Path) -> QuestionModel:
    """Trains under `workdir / "train"`, "train_1", ... unless that is done."""
    weights, origin = trained_seeds(self.train, self.seeds, workdir)
    return QuestionModel(
      self.train.model,
      weights,
      config_lib.DTYPES[self.train.precision],
      self.train.data.words,
      self._asked(),
      origin,
    )

  def _asked(self) -> list[Asked]:
    data, found = self.train.data, []
    count = len(data.source("test"))
    for i in range(min(count, self.questions or count)):
      image, question = data.question(i)
      prompt = data.words.encode(question.prompt)
      found.append(Asked(question, prompt, image.astype(np.float32)))
    return found


@dataclasses.dataclass(frozen=True)
class PublishedModel:
  """A published checkpoint with questions of a file.

  Attributes:
    checkpoint: folder or hub id, see `tokjax.interop.load`.
    questions: a file of JSON lines, each with "image" (a path, relative to the
      file), "question", "answer" (one or several words) and, if it has one,
      "kind".
    template: of a prompt, with "{question}" and the placeholder "<image>".
    revision: on the hub.
    precision: of activations, caches and parameters.
  """

  checkpoint: str
  questions: str
  template: str = "USER: <image>\n{question} ASSISTANT:"
  revision: str | None = None
  precision: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self):
    for part in ("{question}", "<image>"):
      if self.template.count(part) != 1:
        raise ValueError(
          f"template={self.template!r}: must contain {part!r} once"
        )

  def prepare(self, workdir: pathlib.Path) -> QuestionModel:
    """Reads it; nothing is written.

    Raises:
      ConfigError: no such file, a line that is no question, a model that takes
        no images, or a folder without tokenizer or preprocessing.
    """
    del workdir
    dtype = config_lib.DTYPES[self.precision]
    lines = read_questions(pathlib.Path(self.questions))
    model, params, inputs = interop.load(
      zoo.resolve(self.checkpoint), dtype=dtype, param_dtype=dtype,
      revision=self.revision,
    )  # fmt: skip
    if not isinstance(model, VisionLanguage):
      raise typed.ConfigError(
        f"checkpoint={self.checkpoint!r}: is a {type(model).__name__}, which"
        " answers no questions about images"
      )
    for name in ("tokenizer", "preprocessing"):
      if getattr(inputs, name) is None:
        raise typed.ConfigError(
          f"checkpoint={self.checkpoint!r}: the folder has no {name}; put that"
          " of the checkpoint next to its weights"
        )
    asked = [
      Asked(
        question,
        inputs.tokenizer.encode(
          self.template.replace("{question}", question.text)
        ),
        inputs.preprocessing(image),
      )
      for question, image in lines
    ]
    origin = f"{self.checkpoint}, {len(asked)} questions"
    return QuestionModel(
      model.config, (params,), dtype, inputs.tokenizer, asked, origin
    )


def read_questions(
  path: pathlib.Path,
) -> list[tuple[Question, Image.Image]]:
  """Questions and images of a file of JSON lines; see `PublishedModel`.

  Raises:
    ConfigError: it cannot be read, has no question, or a line is no object with
      an image that can be read, a question and an answer.
  """
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise typed.ConfigError(f"questions={str(path)!r}: {error}") from error
  found = []
  for i, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f"{path}, line {i}"
    try:
      value = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise typed.ConfigError(f"{where}: is not JSON ({error})") from error
    wanted = ("image", "question", "answer")
    if not isinstance(value, dict) or not all(
      isinstance(value.get(name), str) and value[name].strip()
      for name in wanted
    ):
      raise typed.ConfigError(
        f'{where}: must be an object with "image", "question" and "answer"'
      )
    kind = str(value.get("kind", "all"))
    question = Question(value["question"], value["answer"], kind)
    found.append((question, _image(path.parent / value["image"], where)))
  if not found:
    raise typed.ConfigError(f"{path}: has no question")
  return found


def _image(path: pathlib.Path, where: str) -> Image.Image:
  try:
    with Image.open(path) as image:
      image.load()
  except OSError as error:
    raise typed.ConfigError(
      f"{where}: image={str(path)!r} cannot be read ({error})"
    ) from error
  return image


QUESTION_MODELS = {
  "trained_questions": TrainedModel,
  "published_questions": PublishedModel,
}
