"""What the pages of the documentation site are made of."""

import ast

import numpy as np
import pytest

from scripts.docs_site import attention, docstrings, maps, measured, reference
from tokjax import recipes
from tokjax.slots import Slots


def rows_of(name):
  return list(measured.of(recipes.find(name)))


def test_rows_of_a_method_come_with_the_heads_of_their_tables():
  found = {t.page: (t.rows[0], rows) for t, rows in rows_of("snapkv")}
  assert {"kv.md", "speed.md"} <= set(found)
  head, (row,) = found["kv.md"]
  assert dict(zip(head, row, strict=True))["method"] == "`snapkv`"
  assert all(len(rows[0]) == len(head) for head, rows in found.values())


@pytest.mark.parametrize(
  ("name", "pages"),
  [
    ("visionzip", ["vlm.md"]),
    ("tap_adl", ["learned.md"]),
    # Rows of tokens drawn at random are not about this recipe.
    ("random", []),
    ("none", ["kv.md"]),
  ],
)
def test_only_rows_that_name_a_method_are_its_own(name, pages):
  found = [table.page for table, _ in rows_of(name)]
  assert list(dict.fromkeys(found)) == pages


def test_every_name_of_a_line_has_an_entry():
  text = """Does it.

Args:
  a: first.
  b, *c: both,
    on two lines.

Returns:
  d, e: not split."""
  assert docstrings.separated(text) == """Does it.

Args:
  a: first.
  b: both,
    on two lines.
  *c: both,
    on two lines.

Returns:
  d, e: not split."""


@pytest.mark.parametrize(
  ("source", "shown"),
  [("Float[Array, 'n']", 'Float[Array, "n"]'), ("'Plan'", "Plan")],
)
def test_shapes_keep_their_quotes(source, shown):
  assert docstrings.written(ast.parse(source, mode="eval").body) == shown


def test_pages_of_packages_have_what_they_export():
  assert "KeepTo" in reference.exported("tokjax.budgets")
  names = reference.exported("tokjax.recipes")
  assert "get" in names and "vision" not in names
  assert reference.exported("tokjax.scores") == []


def test_the_map_of_all_tokens_is_the_one_that_is_asked_for():
  wanted = np.where(np.tri(attention.LENGTH), attention.logits(), -np.inf)
  wanted = np.exp(wanted - wanted.max(axis=1, keepdims=True))
  wanted /= wanted.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(attention.weights(Slots()), wanted, atol=1e-5)


def test_what_has_no_picture_is_known():
  trained = [r for r in recipes.registered() if r.training == "learned"]
  assert trained
  for r in trained:
    assert maps.slots_of(r) is None
