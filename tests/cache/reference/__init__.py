"""Slow NumPy versions of the methods: one example, one query, plain loops.

A reference has the name of its recipe and is a function of a `LayerInput` (what
a layer sees of an example) to the outputs of its prompt `[N, H, D]` and of its
steps `[steps, H, D]`. Numbers of options are those of `cases.SMALL` and
`cases.KEEP`, written out again.

Every recipe of tokjax has a reference here. Recipes of a module that is named
in TOKJAX_RECIPES, `my_recipes`, may have theirs in `my_recipes_reference`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from tests.cache.reference import chunks, probes, prompts, reads, retrieval
from tests.cache.reference import rules, scores, states, stores
from tests.cache.reference.layer_input import layer_input
from tokjax import recipes

__all__ = ["find", "how_to_write", "is_own", "layer_input"]


def is_own(name: str) -> bool:
  """Whether a recipe is defined in tokjax, not in a module of a user."""
  return _module(name).split(".")[0] == "tokjax"


def find(name: str) -> Callable[..., Any] | None:
  """The reference of a recipe, None where there is none."""
  if name in ("gemfilter", "promptdistill"):
    # They shorten the prompt outside of the layers; see test_prompt.py.
    return rules.full
  modules = [
    rules, scores, stores, reads, prompts, retrieval, probes, chunks, states
  ]  # fmt: skip
  if not is_own(name):
    beside = f"{_module(name)}_reference"
    found = importlib.util.find_spec(beside)
    modules = [] if found is None else [importlib.import_module(beside)]
  for module in modules:
    if hasattr(module, name):
      return getattr(module, name)
  return None


def how_to_write(name: str) -> str:
  """What a recipe without a reference lacks, and where it goes."""
  if is_own(name):
    return f"{name} has no reference: write tests.cache.reference.*.{name}"
  return (
    f"{name} has no reference; to compare its outputs with one, write"
    f" {_module(name)}_reference.py with a function {name}(s): in NumPy, from a"
    " LayerInput to the outputs of prompt and steps, such as those of"
    " tests/cache/reference/rules.py"
  )


def _module(name: str) -> str:
  return recipes.find(name).build.__module__
