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
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments import image_prompts, text_prompts, typed
from experiments import prompts as prompting
from experiments.generated import Generated
from experiments.prompts import Prompt
from experiments.request import Generate
from experiments.sweeps.language_models import (
  LanguageModel,
  Pretrained,
  Trained,
)
from experiments.timed_answers import Show
from experiments.training import rundir
from tokjax import zoo

DEFAULT = "smollm2"


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
    text_prompts.refuse_early(config, config.language_model, asked)
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
  out = text_prompts.answer(config, lm, asked, show if alone else None)
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
