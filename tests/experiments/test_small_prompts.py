"""Windows of recipes are made smaller for short prompts, and it is said."""

import functools

import pytest

from experiments.small_prompts import fitted
from experiments.training.config import Recipe
from tests.decoder.models import decoder
from tokjax.models import prefill


def check(slots, prompt):
  prefill.check(decoder(slots), prompt, 4, None)


def fit(name, keep, prompt, **options):
  recipe = Recipe(name, keep, options=tuple(options.items()))
  return fitted(recipe, functools.partial(check, prompt=prompt))


@pytest.mark.parametrize(
  "name, keep, prompt, sizes, changed",
  [
    ("snapkv", 0.25, 512, {}, ""),
    # 50 are kept.
    ("snapkv", 0.25, 200, {"window": 16}, "window=16 instead of window=64"),
    ("pyramidkv", 0.5, 32, {"window": 8}, "window=8"),
    ("adakv", 0.5, 32, {"window": 8}, "window=8 instead of window=32"),
    ("streaming_llm", 0.5, 8, {"first": 1}, "first=1 instead of first=4"),
    ("expected_attention", 0.25, 8, {"sinks": 1}, "sinks=1"),
  ],
)
def test_the_window_becomes_a_part_of_the_budget(
  name, keep, prompt, sizes, changed
):
  recipe, said = fit(name, keep, prompt)
  assert dict(recipe.options) == sizes
  assert changed in said and bool(said) == bool(changed)
  check(recipe.slots(), prompt)


def test_what_the_user_has_set_is_refused():
  with pytest.raises(ValueError, match="keeps 16 of 32.*64.*protect fewer"):
    fit("snapkv", 0.5, 32, window=64)


def test_what_no_size_mends_is_refused_as_before():
  with pytest.raises(ValueError, match="'snapkv' and 'knorm' both"):
    fit("snapkv+knorm", 1.0, 8)


def test_one_token_cannot_be_told_from_a_sink():
  with pytest.raises(ValueError, match="shows 1 of 1 tokens"):
    fit("streaming_llm", 0.5, 1)
