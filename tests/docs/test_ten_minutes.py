"""docs/ten_minutes.md runs from top to bottom and says what comes out."""

import pathlib
import re

import jax
import numpy as np
import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "ten_minutes.md"


@pytest.fixture(scope="module")
def names():
  """What the blocks of the page define, run one after the other."""
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  assert len(blocks) > 6
  defined = {"__name__": "ten_minutes"}
  with jax.numpy_rank_promotion("allow"):
    for code in blocks:
      exec(compile(code, PAGE.name, "exec"), defined)
  return defined


def test_a_pruned_token_is_one_of_the_longest(names):
  fewer, x = names["fewer"], names["x"]
  length = np.linalg.norm(x, axis=-1)
  longest = np.sort(np.argsort(-length)[:3])
  np.testing.assert_array_equal(fewer.position[:, 0], longest)
  np.testing.assert_array_equal(fewer.x, x[longest])


def test_merging_loses_nothing(names):
  merged = names["merged"]
  assert merged.x.shape == (5, 4)
  assert merged.size.sum() == 8
  np.testing.assert_allclose(names["labels"].sum(axis=1), 1, rtol=1e-6)
  assert names["both"].matrix().shape == (2, 8)
  assert names["back"].shape == (8, 4)


def test_what_the_comments_say_of_the_model(names):
  code = PAGE.read_text()
  assert "(2, 9, 32)" in code and names["logits"].shape == (2, 10)
  assert len(names["out"]["plans"]) == 3
  assert names["out"]["tokens"].num_tokens == 9
