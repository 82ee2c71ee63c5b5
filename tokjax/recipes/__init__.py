"""Published methods as short functions. `python -m tokjax.recipes` lists them.

The environment variable TOKJAX_RECIPES names further modules, separated by
commas, whose recipes are registered too: they then take part in everything
that goes over `names()`, such as the contract tests and the sweep.
"""

import importlib
import os

from tokjax.recipes import vision
from tokjax.recipes import language
from tokjax.recipes import multimodal
from tokjax.recipes.registry import Joined
from tokjax.recipes.registry import Recipe
from tokjax.recipes.registry import UnknownOption
from tokjax.recipes.registry import compose
from tokjax.recipes.registry import find
from tokjax.recipes.registry import get
from tokjax.recipes.registry import names
from tokjax.recipes.registry import recipe
from tokjax.recipes.registry import registered
from tokjax.recipes.registry import search

__all__ = [
  "Joined",
  "Recipe",
  "UnknownOption",
  "compose",
  "find",
  "get",
  "language",
  "multimodal",
  "names",
  "recipe",
  "registered",
  "search",
  "vision",
]

for _module in filter(None, os.environ.get("TOKJAX_RECIPES", "").split(",")):
  importlib.import_module(_module.strip())
