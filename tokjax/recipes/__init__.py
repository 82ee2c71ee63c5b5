"""Published methods as short functions. `python -m tokjax.recipes` lists them.

The environment variable TOKJAX_RECIPES names further modules, separated by
commas, whose recipes are registered too: they then take part in everything
that goes over `names()`, such as the contract tests and the sweep.
"""

import importlib
import os

from tokjax.recipes import baselines
from tokjax.recipes import cache
from tokjax.recipes import cache_stores
from tokjax.recipes import clustering
from tokjax.recipes import learned
from tokjax.recipes import llm
from tokjax.recipes import llm_retrieval
from tokjax.recipes import merging
from tokjax.recipes import pruning
from tokjax.recipes.registry import Recipe
from tokjax.recipes.registry import UnknownOption
from tokjax.recipes.registry import find
from tokjax.recipes.registry import get
from tokjax.recipes.registry import names
from tokjax.recipes.registry import recipe

__all__ = [
  "Recipe",
  "UnknownOption",
  "baselines",
  "cache",
  "cache_stores",
  "clustering",
  "find",
  "get",
  "learned",
  "llm",
  "llm_retrieval",
  "merging",
  "names",
  "pruning",
  "recipe",
]

for _module in filter(None, os.environ.get("TOKJAX_RECIPES", "").split(",")):
  importlib.import_module(_module.strip())
