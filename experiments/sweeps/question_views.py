"""Where a vision-language model looks, and which patches recipes leave."""

import pathlib
from collections.abc import Sequence

import flax
import jax
import numpy as np

from experiments import visual_tokens
from experiments.sweeps.question_models import Asked, QuestionModel
from experiments.sweeps.question_programs import generator_of, pack
from experiments.sweeps.results import Row
from experiments.sweeps.subject import Job
from tokjax.analysis import gallery, merge_map

# So many questions that name a cell say where it looks and what remains.
NAMED = 60


def naming(source: QuestionModel) -> list[Asked]:
  """Some of the questions that name a cell."""
  asked = source.asked
  return [one for one in asked if one.question.box is not None][:NAMED]


def stages_of(
  source: QuestionModel, job: Job, asked: Sequence[Asked]
) -> list[visual_tokens.Stage] | None:
  """What is left of patches after each stage; None: cannot be followed."""
  if source.config.pinpoints:
    return None
  try:
    model = source.build(job.slots())
    generator = generator_of(model, source, asked, len(asked))
    prompts = pack(generator, asked, len(asked)).prompts
    key = jax.random.key(0)
    return visual_tokens.look(model, source.params, prompts, key)
  except (ValueError, flax.errors.ScopeParamNotFoundError):
    return None


def looks(source: QuestionModel, job: Job) -> list[list[float]] | None:
  """Where the last token of questions that name a cell looks.

  Means over these questions, for each block of the language model: its
  attention to the patches of the cell, and to all patches. None: no question
  names a cell, or images are cut into crops.

  Args:
    source: the model and the questions.
    job: that reduces nothing.
  """
  asked = naming(source)
  if not asked or source.config.pinpoints:
    return None
  model = source.build(job.slots())
  generator = generator_of(model, source, asked, len(asked))
  prompts = pack(generator, asked, len(asked)).prompts
  found = visual_tokens.attention(source.config, source.params, prompts)
  named = _named(source, asked)
  return [
    [float((x * named).sum(-1).mean()), float(x.sum(-1).mean())] for x in found
  ]


def kept(source: QuestionModel, job: Job) -> Row:
  """How many patches remain at the end, and of cells that are asked about.

  Of questions that name a cell, by the first weights; None: there are none,
  or the recipe cannot be followed through a whole sequence.
  """
  asked = naming(source)
  stages = stages_of(source, job, asked) if asked else None
  if stages is None:
    return {"kept": None, "kept_named": None}
  if not stages:
    return {"kept": 1.0, "kept_named": 1.0}
  remains = stages[-1].remains
  return {
    "kept": float(remains.mean()),
    "kept_named": float(remains[_named(source, asked)].mean()),
  }


def _named(source: QuestionModel, asked: Sequence[Asked]) -> np.ndarray:
  """Patches of the cell that each question names, `[questions, patches]`."""
  grid = source.config.vision.grid
  return np.stack([one.question.named(grid) for one in asked])


def draw(
  source: QuestionModel,
  asked: Sequence[Asked],
  jobs: Sequence[Job],
  path: pathlib.Path,
  title: str,
) -> None:
  """Which patches each recipe leaves of some images, as a picture.

  Recipes that the model cannot be built with, or that cannot be followed
  through a whole sequence, are left out; so is all where images are cut into
  crops.
  """
  if source.config.pinpoints:
    return
  maps = {}
  for job in jobs:
    stages = stages_of(source, job, asked)
    if stages:
      maps[job.method] = stages[-1].groups(source.config.vision.grid)
  gallery.draw_methods(
    merge_map.displayable(np.stack([one.image for one in asked])), maps, path,
    title=title, note=" ".join(one.question.text for one in asked), side=96,
  )  # fmt: skip
