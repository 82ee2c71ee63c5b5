"""The notebook runs from top to bottom, in its small form."""

import ast
import json
import pathlib
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "notebooks" / "tokjax.ipynb").read_text())


def cells() -> list[tuple[str, bool]]:
  """Source of every code cell, and whether it holds the parameters."""
  return [
    (
      "".join(cell["source"]),
      "parameters" in cell["metadata"].get("tags", ()),
    )
    for cell in NOTEBOOK["cells"]
    if cell["cell_type"] == "code"
  ]


def run(source: str, names: dict) -> object:
  """Executes a cell; the value of its last expression, as Jupyter shows it."""
  body = ast.parse(source).body
  last = ast.Expression(body.pop().value) if is_value(body[-1]) else None
  exec(compile(ast.Module(body, []), "cell", "exec"), names)
  return last and eval(compile(last, "cell", "eval"), names)


def is_value(node: ast.stmt) -> bool:
  return isinstance(node, ast.Expr)


def test_it_is_kept_without_outputs():
  """So that a change of it can be read."""
  assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
  for cell in NOTEBOOK["cells"]:
    assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT / "notebooks")
  monkeypatch.setattr(sys, "path", list(sys.path))
  names, shown, parameters = {"__name__": "__main__"}, [], 0
  for source, are_parameters in cells():
    shown.append(run(source, names))
    if are_parameters:
      names.update(form="runlocal", workdir=tmp_path)
      parameters += 1
  assert parameters == 1
  pictures = [x for x in shown if isinstance(x, Image.Image)]
  assert len(pictures) == 3 and all(min(x.size) > 100 for x in pictures)
  for picture in pictures:
    picture.close()
  assert {row["method"] for row in names["results"].rows} == {
    "none", "random", "tome", "avgpool",
  }  # fmt: skip
  shape, answers = shown[-1]
  assert shape[0] == 4 and 1 < shape[1] < 1 + 64 and answers.shape == (4,)


def test_colab_needs_an_address(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, "google.colab", sys)
  with pytest.raises(ValueError, match="repository: give the address"):
    run(cells()[0][0], {})
