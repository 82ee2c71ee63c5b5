"""Recipes whose windows are made for longer prompts, made to fit short ones.

SnapKV protects the last 64 tokens of a prompt; a quarter of 100 tokens are 25.
A model refuses that. A command or a sweep, whose user asked for neither number,
takes a smaller window instead, and says so.
"""

import dataclasses
import inspect
from collections.abc import Callable

from experiments.training.config import Recipe
from tokjax import recipes
from tokjax.slots import Slots

# Options that say how many tokens are protected, or look at the others.
SIZES = ("window", "first", "sinks", "last")


def fitted(
  recipe: Recipe, check: Callable[[Slots], None]
) -> tuple[Recipe, str]:
  """A recipe that `check` accepts, and in words what was changed, or "".

  The largest of its `SIZES` is halved until what is protected is at most half
  of what is kept, so that there is something to choose; if nothing is as small
  as that, until `check` accepts it. What the user has set stays.

  Args:
    recipe: as the user wants it.
    check: raises ValueError for slots that do not fit.

  Raises:
    ValueError: that of `check`, where no smaller size helps.
  """
  try:
    check(recipe.slots())
    return recipe, ""
  except ValueError as error:
    refused = error
  before = sizes = _sizes(recipe)
  small = recipe
  while sizes and max(sizes.values()) > 1:
    name = max(sizes, key=lambda name: sizes[name])
    sizes = {**sizes, name: sizes[name] // 2}
    changed = {n: size for n, size in sizes.items() if size != before[n]}
    options = {**dict(recipe.options), **changed}
    small = dataclasses.replace(recipe, options=tuple(options.items()))
    if _accepts(check, _half(small)):
      break
  if small is recipe or not _accepts(check, small):
    raise refused
  said = [f"{name}={size}" for name, size in changed.items()]
  was = [f"{name}={before[name]}" for name in changed]
  return small, (
    f"recipe {recipe.name!r}: {', '.join(said)} instead of {', '.join(was)},"
    f" which is made for longer prompts ({refused})"
  )


def _sizes(recipe: Recipe) -> dict[str, int]:
  """Sizes that the user has not set."""
  found = recipes.find(recipe.name)
  sizes = {}
  for part in getattr(found, "parts", (found,)):
    for name, option in inspect.signature(part.build).parameters.items():
      if name in SIZES and type(option.default) is int:
        sizes[name] = max(option.default, sizes.get(name, 0))
  given = dict(recipe.options)
  return {name: size for name, size in sizes.items() if name not in given}


def _half(recipe: Recipe) -> Recipe:
  """With half of the budget, where a fraction says what it is."""
  if recipe.keep is None:
    return recipe
  return dataclasses.replace(recipe, keep=recipe.keep / 2)


def _accepts(check: Callable[[Slots], None], recipe: Recipe) -> bool:
  try:
    check(recipe.slots())
  except ValueError:
    return False
  return True
