"""Slow NumPy versions of the methods: one example, one query, plain loops.

A reference has the name of its recipe and is a function of a `LayerInput` (what
a layer sees of an example) to the outputs of its prompt `[N, H, D]` and of its
steps `[steps, H, D]`. Numbers of options are those of `cases.SMALL` and
`cases.KEEP`, written out again.
"""

from tests.cache.reference import prompts, reads, retrieval, rules, scores
from tests.cache.reference import stores
from tests.cache.reference.layer_input import layer_input

__all__ = ["find", "layer_input"]


def find(name: str):
  """The reference of a recipe.

  Raises:
    KeyError: there is none yet.
  """
  if name in ("gemfilter", "promptdistill"):
    # They shorten the prompt outside of the layers; see test_prompt.py.
    return rules.full
  for module in (rules, scores, stores, reads, prompts, retrieval):
    if hasattr(module, name):
      return getattr(module, name)
  raise KeyError(f"write tests.cache.reference.*.{name}")
