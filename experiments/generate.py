"""Text from a prompt, with any recipe, and what it costs.

python -m experiments.generate --prompt "The capital of France is"
python -m experiments.generate --model smollm2 --chat --prompt "Who are you?"
python -m experiments.generate --prompts questions.jsonl --json
python -m experiments.generate --config configs/generate.py:recipe=snapkv ...
python -m experiments.generate --config configs/generate.py:checkpoint=NAME ...
python -m experiments.generate --model FOLDER_OR_RUN --image cat.png \
  --image dog.png --prompt "<image> and <image>: which is larger?"

Streams the text, then prints time to first token, tokens per second and the
bytes of the cache, compared with the full cache. The model is SmolLM2 once it
was fetched (`tokjax models get smollm2`, or --model smollm2 --yes), and a small
one that is trained first, once for each workdir, until then.
"""

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from experiments import image_prompts, typed
from experiments import prompts as prompting
from experiments.drafted import Stream
from experiments.generated import Generated
from experiments.prompts import Answer, Prompt
from experiments.small_prompts import fitted
from experiments.sweeps.language_models import (
  LANGUAGE_MODELS,
  LanguageModel,
  Pretrained,
  Trained,
)
from experiments.training import rundir
from experiments.training.config import DTYPES, Recipe
from experiments.training.eta import working
from tokjax import interop, zoo
from tokjax.models import Decoder, Generator, Sampler, generation, prefill
from tokjax.slots import Bytes, Slots

DEFAULT = "smollm2"
Show = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Generate:
  """What is generated.

  Attributes:
    language_model: the model; "trained" or "pretrained".
    recipe: fills its slots.
    prompt: text that is continued.
    tokens: the largest number of tokens to generate.
    capacity: the longest prompt, in tokens; None: the model's length.
    chunk: tokens of the prompt taken at a time; None: all.
    sampler: how tokens are drawn.
    seed: of the draws.
    chat: the prompt is a user's message, put by the model's chat template.
    stop: texts that end the generated one; they are not part of it.
    batch: prompts of a file that are taken together.
    dataset: of a model of actions, the data set whose scale they have; None:
      there is one only.
  """

  language_model: Annotated[Any, typed.OneOf(LANGUAGE_MODELS)]
  recipe: Recipe = Recipe()
  prompt: str = ""
  tokens: int = 128
  capacity: int | None = None
  chunk: int | None = None
  sampler: Sampler = Sampler()
  seed: int = 0
  chat: bool = False
  stop: tuple[str, ...] = ()
  batch: int = 8
  dataset: str | None = None

  def __post_init__(self):
    for name in ("tokens", "capacity", "chunk", "batch"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value}: must be 1 or more")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed={self.seed}: must be in [0, 2**32)")
    if "" in self.stop:
      raise ValueError(f"stop={self.stop}: a stop string must not be empty")


def load(config: Any) -> Generate:
  """A `Generate` from a ConfigDict or mapping. See `typed.build`."""
  if isinstance(config, Generate):
    return config
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  return typed.build(Generate, config)


def main(
  config: Any,
  workdir: str | pathlib.Path,
  prompt: str | None = None,
  show: Show = sys.stdout.write,
  *,
  prompts: str | pathlib.Path | None = None,
  model: str | None = None,
  yes: bool = False,
  as_json: bool = False,
  images: Sequence[str | pathlib.Path] = (),
) -> Generated | list[Generated]:
  """Generates as `config` says.

  Args:
    config: a `Generate` or what `load` takes.
    workdir: where a model is trained if none is given.
    prompt: instead of the config's.
    show: is given the text piece by piece, and the report.
    prompts: a file of prompts, see `experiments.prompts.read`, instead of one.
    model: a checkpoint or a name of `tokjax models`, instead of the config's.
    yes: a model of `tokjax models` that is not here may be downloaded.
    as_json: `show` is given one line of JSON for each prompt, and no more.
    images: files, in the order of the placeholders `<image>` of the prompt; the
      model is then a vision-language model, a checkpoint or the workdir of a
      run.

  Returns:
    One, or a list where `prompts` is given.
  """
  if images:
    config = load(config)
    if prompts is not None:
      raise ValueError("image and prompts: give one of the two")
    return with_images(config, prompt, model, images, show, as_json)
  config, workdir = chosen(load(config), model, yes), pathlib.Path(workdir)
  if prompts is not None and prompt is not None:
    raise ValueError("prompt and prompts: give one of the two")
  asked = [Prompt(config.prompt if prompt is None else prompt)]
  if prompts is not None:
    asked = prompting.read(pathlib.Path(prompts))
  config.recipe.slots()  # Refused before a model is trained or read.
  if isinstance(config.language_model, Trained):
    refuse_early(config, config.language_model, asked)
  # Progress of training is no part of what a program reads.
  with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
    lm = config.language_model.prepare(workdir)
  if lm.tokenizer is None:
    raise ValueError(
      f"language_model: {lm.origin} on {lm.data} has no tokenizer; take one"
      " that was trained on text"
    )
  say_model(config, lm)
  alone = prompts is None and not as_json
  out = answer(config, lm, asked, show if alone else None)
  if as_json:
    for one in out:
      show(one.record(lm.origin, config.recipe.name) + "\n")
  elif alone:
    show(f"\n\n{out[0].report()}\n")
  else:
    for one in out:
      show(f"> {one.prompt}\n{one.text}\n\n")
    show(f"{out[-1].report()}\n")
  return out if prompts is not None else out[0]


def with_images(
  config: Generate,
  prompt: str | None,
  model: str | None,
  images: Sequence[str | pathlib.Path],
  show: Show,
  as_json: bool,
) -> Generated:
  """`main` for a prompt with images.

  Raises:
    ConfigError: no model is named.
    ValueError: see `image_prompts.answer`.
  """
  own = config.language_model
  source = own.checkpoint if isinstance(own, Pretrained) else None
  if (source := model or source) is None:
    raise typed.ConfigError(
      "image: needs --model, a checkpoint of a vision-language model or the"
      " workdir of a run that trained one"
    )
  text = config.prompt if prompt is None else prompt
  out = image_prompts.answer(
    config, source, text, images, None if as_json else show
  )
  if as_json:
    show(out.record(source, config.recipe.name) + "\n")
  else:
    show(f"\n\n{out.report()}\n")
  return out


def chosen(config: Generate, model: str | None, yes: bool) -> Generate:
  """The configuration with the model that the user asked for.

  Raises:
    zoo.FetchError: it is in `tokjax models`, not here, and the user does not
      want it downloaded.
  """
  if model is None and yes and isinstance(config.language_model, Trained):
    model = DEFAULT
  if model is None:
    return config
  if model in zoo.MODELS and not pathlib.Path(model).exists():
    if zoo.find(model) is None and (yes or consents(zoo.MODELS[model])):
      zoo.get(model)
  zoo.resolve(model)  # Refused before anything is read.
  return dataclasses.replace(config, language_model=Pretrained(model))


def consents(model: zoo.Model) -> bool:
  """Asks whether a model may be downloaded; False where nobody can answer."""
  if not sys.stdin.isatty():
    return False
  sys.stderr.write(
    f"{model.name} is not here: {model.size / 1e6:.0f} MB, {model.licence}."
    " Download it? [y/N] "
  )
  sys.stderr.flush()
  return sys.stdin.readline().strip().lower() in ("y", "yes")


def say_model(config: Generate, lm: LanguageModel) -> None:
  """Says which model it is, where it does not mix with the text."""
  hint = ""
  if isinstance(config.language_model, Trained) and zoo.find(DEFAULT) is None:
    hint = f" (a real one: --model {DEFAULT} --yes)"
  print(f"model: {lm.origin}{hint}", file=sys.stderr, flush=True)


def answer(
  config: Generate,
  lm: LanguageModel,
  asked: Sequence[Prompt],
  show: Show | None = None,
) -> list[Generated]:
  """What follows each prompt; of a single one, `show` is given the pieces."""
  ids = [one.encode(lm.tokenizer, config.chat) for one in asked]
  made = build(lm, config, sys.stderr.write)
  made.pack(ids)  # Refused before anything is compiled.
  stream, out = Stream(made, config), []
  for i in range(0, len(asked), config.batch):
    part = ids[i : i + config.batch]
    out += answer_batch(lm, stream, asked[i:], part, show)
  return out


def answer_batch(
  lm: LanguageModel,
  stream: Stream,
  asked: Sequence[Prompt],
  ids: Sequence[Sequence[int]],
  show: Show | None,
) -> list[Generated]:
  """Prompts that are taken together."""
  with working("compiling", sys.stderr):
    compiled, sizes = warm_up(stream, ids)
  answers, first, rate = run(stream, lm, ids, show)
  logical = np.broadcast_to(np.asarray(sizes.logical), len(ids))
  full = full_bytes(stream.generator, ids)
  return [
    Generated(
      text.text,
      tuple(text.ids),
      first,
      rate,
      compiled,
      float(logical[i]),
      sizes.physical // len(ids),
      full // len(ids),
      asked[i].text,
      len(ids[i]),
      text.stopped,
      per_step=stream.per_step,
    )
    for i, text in enumerate(answers)
  ]


def refuse_early(
  config: Generate, source: Trained, asked: Sequence[Prompt]
) -> None:
  """Traces the model with its slots and prompts, before it is trained.

  Raises:
    ValueError: what `answer` would raise once the model is there.
  """
  train = source.train
  if train.data.num_classes != 256:
    return
  example = jax.ShapeDtypeStruct((1, min(64, train.model.length)), "int32")
  init = train.build_model().init
  shapes = jax.eval_shape(init, jax.random.key(0), example)["params"]
  lm = LanguageModel(
    train.model, shapes, DTYPES[train.precision], interop.Bytes(), train.data,
    "",
  )  # fmt: skip
  ids = [one.encode(lm.tokenizer, config.chat) for one in asked]
  made = build(lm, config)
  made.pack(ids)
  state_shapes(made, made.model, ids)


def build(
  lm: LanguageModel, config: Generate, say: Show = lambda text: None
) -> Generator:
  """The language model with the recipe's slots, and room.

  Args:
    lm: the model.
    config: with a recipe whose windows may be too large for the capacity.
    say: is told if smaller ones are used.
  """
  capacity = config.capacity or lm.config.length

  def check(slots):
    prefill.check(lm.build(slots), capacity, config.tokens, config.chunk)

  recipe, changed = fitted(config.recipe, check)
  if changed:
    say(f"note: {changed}\n")
  model = lm.build(recipe.slots())
  return Generator(
    model,
    lm.params_for(model),
    capacity=capacity,
    decode=config.tokens,
    chunk=config.chunk,
  )


def warm_up(
  stream: Stream, ids: Sequence[Sequence[int]]
) -> tuple[float, Bytes]:
  """Runs both compiled functions once: seconds, and sizes of the cache."""
  began = time.perf_counter()
  made = stream.generator
  sizes = made.bytes(made.prefill(ids))
  for _ in zip(stream(ids), range(2), strict=False):
    pass
  return time.perf_counter() - began, sizes


def run(
  stream: Stream,
  lm: LanguageModel,
  ids: Sequence[Sequence[int]],
  show: Show | None,
) -> tuple[list[Answer], float, float]:
  """Answers, seconds to the first token, tokens per second."""
  tokenizer, times, later = lm.tokenizer, [], 0
  stop = stream.config.stop
  answers = [Answer(tokenizer.decode, tokenizer.ends, stop) for _ in ids]
  show = show or (lambda text: None)
  began = time.perf_counter()
  for tokens in stream(ids, ends=tokenizer.ends):
    times.append(time.perf_counter() - began)
    for one, token in zip(answers, tokens, strict=True):
      if token >= 0 and not one.done:
        later += len(times) > 1
        show(one.add(int(token)))
    sys.stdout.flush()
    if all(one.done for one in answers):
      break
  show(answers[-1].rest())
  rate = later / (times[-1] - times[0]) if len(times) > 1 else math.nan
  return answers, times[0], rate


def full_bytes(made: Generator, ids: Sequence[Sequence[int]]) -> int:
  """Bytes of the full cache in place of the recipe's; nothing is computed."""
  leaves = state_shapes(made, made.model.clone(slots=Slots()), ids)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def state_shapes(
  made: Generator, model: Decoder, ids: Sequence[Sequence[int]]
) -> list[jax.ShapeDtypeStruct]:
  """Of the caches after the prompts; nothing is computed."""
  length = made.bucket(max(len(one) for one in ids))
  shape = jax.ShapeDtypeStruct((len(ids), length), "int32")

  def states(params, tokens, length):
    going = generation.prefill(model, params, tokens, length, made.decode)
    return jax.tree.leaves(going.states)

  lengths = jax.ShapeDtypeStruct((len(ids),), "int32")
  return jax.eval_shape(states, made.params, shape, lengths)


def from_command_line(given: Any) -> None:
  """`main` with the options of the command."""
  rundir.keep_programs()
  config = given.config.to_dict()
  if given.chat:
    config["chat"] = True
  if given.stop:
    config["stop"] = tuple(given.stop)
  main(
    config,
    given.workdir,
    given.prompt,
    prompts=given.prompts,
    model=given.model,
    yes=given.yes,
    as_json=given.json,
    images=given.image or (),
  )


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      __doc__ or "",
      (
        Option("prompt", str, None, "Text to continue."),
        Option("prompts", str, None, "File of prompts, text or .jsonl."),
        Option("image", str, None, "A file, for the prompt.", many=True),
        Option("model", str, None, "Of `tokjax models`, or a checkpoint."),
        Option("yes", bool, False, "The model may be downloaded."),
        Option("chat", bool, False, "The prompt is a user's message."),
        Option("stop", str, None, "End the text at this string.", many=True),
        Option("json", bool, False, "Print a line of JSON for each prompt."),
        launch.workdir(str(pathlib.Path.home() / ".cache/tokjax/generate")),
        *launch.COMMON,
      ),
      (Generate,),
      file=str(pathlib.Path(__file__).parents[1] / "configs" / "generate.py"),
    ),
    from_command_line,
  )
