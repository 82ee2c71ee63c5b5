"""Options of recipes that the shared cases leave at their defaults.

References are written from the official code that the recipe names.
"""

import functools

import numpy as np
import pytest

from tests.cache import reference
from tests.cache.cases import DEPTH, LENGTHS, case
from tests.cache.reference import rules, scores

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
OPTIONS = {
  "adakv normalise": (
    {"normalise": True},
    functools.partial(scores.adakv, normalise=True),
  ),
  "pyramidkv max": (
    {"pooling": "max"},
    functools.partial(scores.pyramidkv, pooling="max"),
  ),
  "sepllm streaming": (
    {"slack": 1, "reindexed": True},
    rules.sepllm_streaming,
  ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_equal_the_reference(name):
  options, function = OPTIONS[name]
  found = case(name.split()[0], **options)
  for b, n in enumerate(LENGTHS):
    shared = {}
    for layer in range(DEPTH):
      prompt, steps = function(reference.layer_input(found, b, layer, shared))
      message = f"layer {layer}, example {b}"
      np.testing.assert_allclose(
        found.prefilled[layer, b, :n], prompt, err_msg=message, **CLOSE
      )
      np.testing.assert_allclose(
        found.decoded[:, layer, b], steps, err_msg=message, **CLOSE
      )
