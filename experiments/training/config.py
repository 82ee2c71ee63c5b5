"""What a run is: frozen typed dataclasses, built once from a config file."""

import dataclasses
import math
import re
import typing
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from experiments import typed
from experiments.data import DATA
from experiments.tasks import TASKS
from experiments.training.checkpoints import Options as Checkpoint
from experiments.training.mesh import Mesh
from experiments.training.optim import Optimizer
from experiments.training.published import FromInit, resolve
from tokjax import budgets, recipes
from tokjax.models import (
  Decoder,
  DecoderConfig,
  VisionLanguage,
  VisionLanguageConfig,
  ViT,
  ViTConfig,
)
from tokjax.slots import Slots

MODELS = {
  "vit": ViTConfig,
  "decoder": DecoderConfig,
  "vlm": VisionLanguageConfig,
  "init": FromInit,
}
BUILDERS = {
  ViTConfig: ViT,
  DecoderConfig: Decoder,
  VisionLanguageConfig: VisionLanguage,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Entries of a model that are sizes, where it has them.
SIZES = (
  "image_size", "patch_size", "channels", "width", "heads", "kv_heads",
  "mlp_dim", "num_classes", "vocabulary", "length",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Own:
  """The recipe's own budget."""


BUDGETS = {
  "own": Own,
  "once": budgets.Once,
  "ratio": budgets.Ratio,
  "even": budgets.Even,
  "constant": budgets.Constant,
  "linear": budgets.Linear,
  "capped": budgets.Capped,
}


@dataclasses.dataclass(frozen=True)
class Warmup:
  """All tokens at first, then fewer along a cosine, at last the recipe's own.

  EViT's (checked against helpers.py). Shapes are static, so that the cosine
  has steps: training passes through `levels` programs, one compilation each.

  Attributes:
    start: share of the run in which all tokens stay.
    stop: share of the run after which `keep` holds.
    levels: how many counts there are, the first and the last included.
    stages: reductions that share `keep`; the cosine is that of one of them.
  """

  start: float = 0.1
  stop: float = 0.5
  levels: int = 5
  stages: int = 3

  def __post_init__(self):
    if not 0 <= self.start < self.stop <= 1:
      raise ValueError(
        f"start={self.start}, stop={self.stop}: must be 0 <= start < stop <= 1"
      )
    if not 3 <= self.levels <= 8:
      raise ValueError(f"levels={self.levels}: must lie in 3..8")
    if self.stages < 1:
      raise ValueError(f"stages={self.stages}: must be 1 or more")

  def level(self, step: int, steps: int) -> int:
    """Which count a step of the run (from 0) has: 0 for all tokens."""
    done = (step / steps - self.start) / (self.stop - self.start)
    if done < 0:
      return 0
    # A step on a boundary belongs to the next level, however it is rounded.
    passed = int(done * (self.levels - 2) + 1e-9)
    return min(1 + passed, self.levels - 1)

  def keep(self, keep: float, level: int) -> float:
    """The fraction of tokens that remains at a level."""
    if level in (0, self.levels - 1):
      return keep if level else 1.0
    rate = keep ** (1 / self.stages)
    done = (level - 0.5) / (self.levels - 2)
    rate += (1 - rate) * (1 + math.cos(math.pi * done)) / 2
    return round(rate**self.stages, 6)


def option_of(hint: Any, value: Any, where: str) -> Any:
  """An option of a recipe, of the type that the recipe states.

  Of a budget a whole number is a number of tokens, another one a fraction.

  Raises:
    ConfigError: it has another type, or is out of range.
  """
  if budgets.Budget in (hint, *typing.get_args(hint)):
    kinds = {int: budgets.Count, float: budgets.Share}
    if (kind := kinds.get(type(value))) is not None:
      try:
        return kind(value)
      except budgets.BudgetError as error:
        raise typed.ConfigError(f"{where}: {error}") from error
    if not isinstance(value, budgets.Budget | None):
      raise typed.ConfigError(
        f"{where}={value!r}: must be a number of tokens or a fraction"
      )
  return typed.convert(hint, value, where)


def options_of(
  recipe: recipes.Recipe | recipes.Joined, given: dict[str, Any]
) -> dict[str, Any]:
  """Options of a recipe, each as `option_of` makes it; unknown ones as given.

  Raises:
    ConfigError: see `option_of`.
  """
  hints = {
    key: hint
    for part in getattr(recipe, "parts", (recipe,))
    for key, hint in typing.get_type_hints(
      part.build, include_extras=True
    ).items()
  }
  return {
    key: option_of(hints[key], value, f"recipe {recipe.name!r}: {key}")
    if key in hints
    else value
    for key, value in given.items()
  }


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which recipe fills the model's slots while it trains.

  Attributes:
    name: see `tokjax.recipes.names()`.
    keep: fraction of tokens that remain at the end; None: as the budget says.
    budget: how many remain where; see `tokjax.budgets`.
    options: other options of the recipe; a number of tokens or a fraction is a
      budget too.
    warmup: begin with more tokens than `keep`; None: with these.
  """

  name: str = "none"
  keep: float | None = None
  budget: Annotated[Any, typed.OneOf(BUDGETS)] = Own()
  options: dict[str, Any] = ()
  warmup: Warmup | None = None

  def __post_init__(self):
    if self.keep is not None and not 0 < self.keep <= 1:
      raise ValueError(f"keep={self.keep}: must be in (0, 1]")
    if self.warmup is not None and self.keep is None:
      raise ValueError("warmup: ends at `keep`, which must be given")

  def level(self, step: int, steps: int) -> int | None:
    """Of the warm-up, at a step (from 0) of a run; None: there is none."""
    return None if self.warmup is None else self.warmup.level(step, steps)

  def slots(self, level: int | None = None) -> Slots:
    """As the model is used, or at a level of the warm-up.

    Raises:
      ConfigError: no such recipe, or no such option of it.
    """
    found, given = self.call(level)
    try:
      return found(**given)
    except (recipes.UnknownOption, ValueError) as error:
      raise typed.ConfigError(str(error)) from error

  def call(self, level: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The recipe, and the options that it is called with.

    Args:
      level: of the warm-up; None: as the model is used.

    Raises:
      ConfigError: no such recipe, or an option of another type.
    """
    keep = self.keep
    if level is not None:
      keep = self.warmup.keep(keep, level)
    try:
      found = recipes.find(self.name)
    except (KeyError, ValueError) as error:
      raise typed.ConfigError(error.args[0]) from error
    given = options_of(found, dict(self.options))
    if not isinstance(self.budget, Own):
      given["budget"] = self.budget
    if keep is not None:
      given["keep"] = keep
    return found, given


@dataclasses.dataclass(frozen=True)
class Config:
  """A run of the loop.

  Attributes:
    model, data, task: one of several, chosen by `name`.
    recipe: fills the model's slots while it trains.
    optimizer: schedule and update rule.
    checkpoint: how often and how many.
    mesh: of the devices.
    init: what to start from: the workdir of a run, or a published checkpoint
      (folder, hub id, name of `tokjax models`). Parameters that it does not
      have, such as a recipe's own, start at random.
    fresh: parameters, as a regular expression on their names, that start at
      random although `init` has them.
    teacher: what to distil from: a run or a published checkpoint; see the task.
    steps: optimiser steps.
    seed: of the parameters, the order of examples and what is drawn.
    batch_size, eval_batch_size: of all devices and hosts together.
    precision: of activations; parameters and optimiser stay float32.
    threads, processes: that load data on every host; 0 processes: only
      threads.
    log_every, eval_every: in steps.
  """

  model: Annotated[Any, typed.OneOf(MODELS)]
  data: Annotated[Any, typed.OneOf(DATA)]
  task: Annotated[Any, typed.OneOf(TASKS)]
  recipe: Recipe = Recipe()
  optimizer: Optimizer = Optimizer()
  checkpoint: Checkpoint = Checkpoint()
  mesh: Mesh = Mesh()
  init: str | None = None
  fresh: str | None = None
  teacher: str | None = None
  steps: int = 1000
  batch_size: int = 128
  eval_batch_size: int = 256
  seed: int = 0
  precision: Literal["float32", "bfloat16"] = "float32"
  threads: int = 4
  processes: int = 0
  log_every: int = 50
  eval_every: int = 500

  def __post_init__(self):
    for name in (
      "steps", "batch_size", "eval_batch_size", "log_every", "eval_every",
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    for name in SIZES:
      size = getattr(self.model, name, None)
      if size is not None and np.min(size) < 1:
        raise ValueError(f"model.{name}={size}: must be 1 or more")
    if self.threads < 1 or self.processes < 0:
      raise ValueError(
        f"threads={self.threads}, processes={self.processes}: must be 1 or"
        " more, and 0 or more"
      )
    for name in ("init", "teacher"):
      if getattr(self, name) == "":
        raise ValueError(f"{name}='': must name a run or a checkpoint")
    if self.fresh is not None:
      check_pattern("fresh", self.fresh, self.init)
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed={self.seed}: must be in [0, 2**32)")
    if self.batch_size % self.optimizer.accumulate:
      raise ValueError(
        f"batch_size={self.batch_size}: must be a multiple of"
        f" optimizer.accumulate={self.optimizer.accumulate}"
      )
    if isinstance(self.model, FromInit):
      model, data, fresh = resolve(self.model, self.init, self.data)
      object.__setattr__(self, "model", model)
      object.__setattr__(self, "data", data)
      both = [f"({pattern})" for pattern in (self.fresh, fresh) if pattern]
      object.__setattr__(self, "fresh", "|".join(both) or None)

  def build_model(self, slots: Slots | None = None) -> nn.Module:
    """The model with these slots (None: those of `recipe`)."""
    slots = self.recipe.slots() if slots is None else slots
    dtype = DTYPES[self.precision]
    return BUILDERS[type(self.model)](self.model, slots, dtype=dtype)

  def to_dict(self) -> dict[str, Any]:
    """Plain values; `load` makes the same config of them."""
    return typed.to_dict(self)


def check_pattern(name: str, pattern: str, init: str | None) -> None:
  """Raises ValueError for a `fresh` that cannot be used."""
  if init is None:
    raise ValueError(f"{name}={pattern!r}: needs `init`")
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"{name}={pattern!r}: is no regular expression ({error})"
    ) from error


def load(config: Any) -> Config:
  """A `Config` from a ConfigDict or mapping. See `typed.build` for errors."""
  if isinstance(config, Config):
    return config
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  return typed.build(Config, config)
