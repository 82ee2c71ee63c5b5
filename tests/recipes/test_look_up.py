"""Recipes are found by name, title and arXiv number, and can be cited."""

import io
import os
import re
import sys

import pytest

from tokjax import recipes
from tokjax.recipes import __main__ as command
from tokjax.recipes import pages


def found(text):
  return [r.name for r in recipes.search(text)]


def test_names_are_found_in_any_case_and_titles_by_words():
  assert recipes.find("SnapKV").name == "snapkv"
  assert recipes.get("Streaming-LLM").name == "streaming_llm"
  assert found("token merging stable diffusion") == ["tomesd"]
  assert found("https://arxiv.org/abs/2404.14469") == ["snapkv"]
  assert found("2210.09461") == ["tome", "tome_kth", "tome_random"]
  assert found("") == found("no such words") == []


def test_what_may_be_several_recipes_is_no_name():
  with pytest.raises(KeyError, match="may be any of the recipes tome, tome_"):
    recipes.get("2210.09461")


def test_a_number_that_is_none_is_refused():
  with pytest.raises(ValueError, match="arxiv='ToMe': must be a number"):
    recipes.recipe("mine", family="vision", paper="-", arxiv="ToMe")


def test_every_paper_says_where_it_is():
  for name in recipes.names():
    r = recipes.find(name)
    if r.paper == "-":
      continue
    assert r.arxiv and 2017 <= r.year <= 2026, name
    official = re.match(r"([\w.-]+/[\w.-]+):", r.evidence)
    third = {"dpc_knn", "knorm"}  # Checked against a reimplementation.
    if official and name not in third:
      assert r.code == official.group(1), name


def test_a_page_holds_rule_options_and_entry(capsys):
  command.main(["snapkv"])
  text = capsys.readouterr().out
  assert "What the last `window` queries attend to" in text
  assert "  window: int = 64" in text and "eprint = {2404.14469}" in text
  # Only the title in the entry and the rule's docstring keep their lines.
  assert max(map(len, text.split("@misc")[0].splitlines())) <= pages.WIDTH


def test_the_table_is_short_on_a_terminal_and_whole_in_a_pipe(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  for terminal in (True, False):
    out = io.StringIO()
    out.isatty = lambda terminal=terminal: terminal
    monkeypatch.setattr(sys, "stdout", out)
    command.main([])
    lines = out.getvalue().splitlines()
    assert len(lines) == len(recipes.names()) + (not terminal)
    if terminal:
      assert max(map(len, lines)) <= pages.WIDTH
    else:
      assert {line.count("\t") for line in lines} == {9}


def test_the_meaning_of_an_option_is_next_to_it(capsys):
  command.main(["snapkv"])
  text = capsys.readouterr().out
  assert re.search(r"\n  window: int = 64\n      last queries of the", text)
  # Once: the docstring's own list of arguments is not printed again.
  assert text.count("window:") == 1 and "Args:" not in text


def test_a_meaning_may_take_several_lines():
  (_, layer) = pages.options(recipes.find("fastv"))
  assert layer.meaning == (
    "block before which half of the visual tokens go, as a number or a"
    " fraction of the depth"
  )


def test_a_wider_terminal_shows_more(monkeypatch):
  rows = {}
  for columns in ("80", "200"):
    monkeypatch.setenv("COLUMNS", columns)
    rows[columns] = list(command.short_rows(recipes.registered()))
  assert any("..." in row for row in rows["80"])
  assert max(map(len, rows["80"])) <= 80
  assert sum(map(len, rows["200"])) > sum(map(len, rows["80"]))


def test_markdown_says_what_the_terminal_says():
  for r in recipes.registered():
    text = pages.markdown(r)
    for option in pages.options(r):
      assert f"- `{option.signature}`" in text, (r.name, option.name)
    rule, _ = pages.documented(r)
    assert text.startswith(rule) and "Args:" not in text
    assert (pages.bibtex(r) in text) == (r.paper != "-")


def test_joined_recipes_have_a_page_each(capsys):
  command.main(["evit+tome"])
  text = capsys.readouterr().out
  assert text.startswith("evit: ") and "\ntome: Token Merging" in text


def test_columns_of_the_short_table_do_not_touch():
  for line in command.short_rows(recipes.registered()):
    name, slots, paper = re.split(r" {2,}", line, maxsplit=2)
    r = recipes.find(name)
    assert slots == pages.slots_of(r())
    assert r.paper.startswith(paper.removesuffix("..."))


def test_a_closed_pipe_ends_it_quietly(monkeypatch):
  read, write = os.pipe()
  os.close(read)
  with os.fdopen(write, "w") as closed:
    monkeypatch.setattr(sys, "stdout", closed)
    command.main([])


def test_an_unknown_one_is_one_line():
  with pytest.raises(SystemExit, match="^error: unknown recipe 'tomee'; did"):
    command.main(["tomee"])
