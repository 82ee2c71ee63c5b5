"""What a sweep asks of a kind of model.

`Sweep` holds the settings that all kinds share; a kind adds its own and makes
a `Subject`: the model with its data, which says what is compiled, scored and
timed, and how rows are shown. `experiments.sweep` does the rest: which rows are
missing, compiling in threads, timing in turns, saving, printing, drawing. A new
kind of model is a file next to `classification.py` and a line in
`experiments.sweep.KINDS`.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from experiments import typed
from experiments.sweeps.count import Told
from experiments.sweeps.report import Plot, Table
from experiments.sweeps.results import WHOLE, Results, Row
from experiments.training import config
from tokjax import recipes
from tokjax.slots import Slots


class UnknownRecipe(typed.ConfigError, KeyError):
  """No such recipe or family; a KeyError too, as `recipes.find` raises."""

  def __str__(self) -> str:
    # KeyError would print the message in quotes.
    return str(self.args[0])


def find(name: str) -> recipes.Recipe | recipes.Joined:
  """The recipe of that name.

  Raises:
    UnknownRecipe: there is none; names near ones.
    ConfigError: shares of a keep ratio that cannot be.
  """
  try:
    return recipes.find(name)
  except ValueError as error:
    raise typed.ConfigError(str(error)) from error
  except KeyError as error:
    raise UnknownRecipe(error.args[0]) from error


class Unfit(ValueError):
  """A recipe that this model cannot be built with, and why."""

  def __init__(self, job: "Job", reason: str):
    super().__init__(f"{job.method} at keep={job.keep}: {reason}")
    self.job, self.reason = job, reason


@dataclasses.dataclass(frozen=True)
class Job:
  """A recipe at a keep ratio; None: its own budget.

  Attributes:
    method, keep: see `tokjax.recipes.get`.
    options: other options of the recipe, names and values.
  """

  method: str
  keep: float | None
  options: tuple[tuple[str, Any], ...] = ()

  def slots(self) -> Slots:
    """The slots of the recipe.

    Raises:
      UnknownRecipe: no such recipe.
      UnknownOption: no such option of it.
      ConfigError: an option of another type.
      ValueError: an option or keep ratio out of range.
    """
    keep = {} if self.keep is None else {"keep": self.keep}
    found = find(self.method)
    return found(**keep, **config.options_of(found, dict(self.options)))

  def follows_keep(self) -> bool:
    """Whether a keep ratio changes the recipe."""
    try:
      return dataclasses.replace(self, keep=None).slots().follows_keep
    except ValueError:
      return True


UNREDUCED = Job(WHOLE, None)


class Program(Protocol):
  """What a subject compiles of a job."""

  @property
  def job(self) -> Job: ...


P = TypeVar("P", bound=Program)


class Subject(Protocol[P]):
  """A model with its data.

  Attributes:
    origin: where the weights come from, in words.
  """

  origin: str

  def compile(self, job: Job) -> P:
    """The model with a recipe, compiled; called in several threads.

    Raises:
      Unfit: the model cannot be built with the recipe at this keep ratio.
    """
    ...

  def score(
    self, programs: Sequence[P], whole: P, told: Told
  ) -> Sequence[Row]:
    """What is measured of each program but its speed; a row for each.

    Args:
      programs, whole: with recipes, and the unreduced model.
      told: called with the number of parts that are done and of all parts.
    """
    ...

  def calls(self, program: P) -> Mapping[str, Callable[[], Any]]:
    """What is timed of a program, by name; its inputs are computed before."""
    ...

  def speed(self, seconds: Mapping[str, np.ndarray]) -> Row:
    """Columns about speed.

    Args:
      seconds: for each of `calls`, times of the program and of the unreduced
        model next to it, `[rounds, 2]`.
    """
    ...

  def plot(self, results: Results) -> Plot:
    """What the rows lose against what they save."""
    ...

  def table(self, results: Results) -> Table:
    """The rows for the terminal."""
    ...

  def picture(
    self, results: Results, methods: Sequence[str], path: pathlib.Path
  ) -> None:
    """Draws what the methods do to the tokens."""
    ...


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Settings that sweeps of all kinds of model share.

  Attributes:
    subject: where the model and its data come from, one of `SUBJECTS`.
    recipes: names; empty: all of `families` that need no training.
    families: see `tokjax.recipes.names`.
    keeps: fractions of tokens that remain at the end.
    batch_size: of all programs; the one shape that is compiled.
    rounds: how often each program is timed.
    threads: that compile.
    picture_keep: keep ratio of the picture.
  """

  subject: Any
  recipes: tuple[str, ...] = ()
  families: tuple[str, ...] = ()
  keeps: tuple[float, ...] = (0.5,)
  batch_size: int = 16
  rounds: int = 5
  threads: int = 2
  picture_keep: float = 0.5

  # Of a kind: choices of `subject.name`; names of the files; the settings that
  # rows depend on; the recipe of its families that reduces nothing; how many
  # rows are made and saved together, None: all of a keep ratio; which share of
  # a row's time compiling is, about, for the time that is left.
  SUBJECTS: ClassVar[Mapping[str, type]]
  STEM: ClassVar[str]
  PICTURE: ClassVar[str]
  DEPENDS: ClassVar[tuple[str, ...]]
  NOTHING: ClassVar[str]
  TOGETHER: ClassVar[int | None] = None
  COMPILING: ClassVar[float] = 0.5

  def __post_init__(self):
    self.at_least_one("batch_size", "rounds", "threads")
    self.fractions("keeps", *self.keeps)
    self.fractions("picture_keep", self.picture_keep)

  def at_least_one(self, *names: str) -> None:
    """Raises ValueError for a setting below 1."""
    for name in names:
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")

  def fractions(self, name: str, *values: float) -> None:
    """Raises ValueError for a value outside (0, 1]."""
    for value in values:
      if not 0 < value <= 1:
        raise ValueError(f"{name}: {value} is not in (0, 1]")

  def prepare(self, workdir: pathlib.Path) -> Subject[Any]:
    """The model with its data; what it trains is written under `workdir`."""
    raise NotImplementedError

  def methods(self) -> tuple[str, ...]:
    """Names of the recipes to compare, without the unreduced model.

    Raises:
      UnknownRecipe: no such recipe or family.
    """
    chosen = self.recipes or _training_free(self.families)
    names = dict.fromkeys(find(name).name for name in chosen)
    nothing = (WHOLE,) if self.recipes else (WHOLE, self.NOTHING)
    return tuple(name for name in names if name not in nothing)

  def options_of(self, method: str) -> dict[str, Any]:
    """Options of a recipe that the kind gives it."""
    del method
    return {}

  def job(self, method: str, keep: float) -> Job:
    """A recipe at a keep ratio, with its options."""
    return Job(method, keep, tuple(sorted(self.options_of(method).items())))

  def fingerprint(self) -> dict[str, Any]:
    """What rows depend on: with another value they have to be made again."""
    values = typed.to_dict(self)
    return {name: values[name] for name in self.DEPENDS}


@dataclasses.dataclass(frozen=True)
class OptionsSweep(Sweep):
  """A sweep whose config may give options to recipes.

  Attributes:
    options: of recipes, by name, instead of their defaults.
  """

  options: dict[str, Any] = ()

  def methods(self) -> tuple[str, ...]:
    """See `Sweep.methods`.

    Raises:
      ConfigError: no such recipe or family, or `options` that a recipe does
        not have.
    """
    for name, given in dict(self.options).items():
      known = find(name).options
      if unknown := [option for option in given if option not in known]:
        raise typed.ConfigError(
          f"options[{name!r}]: {unknown[0]!r} must be one of {known}"
        )
    return super().methods()

  def options_of(self, method: str) -> dict[str, Any]:
    """See `Sweep.options_of`."""
    return dict(dict(self.options).get(method, {}))


def _training_free(families: Sequence[str]) -> list[str]:
  names = []
  for family in families:
    found = recipes.names(family)
    if not found:
      known = sorted({recipes.find(name).family for name in recipes.names()})
      raise UnknownRecipe(f"families: {family!r} is not among {known}")
    names += [n for n in found if recipes.find(n).training != "learned"]
  return names
