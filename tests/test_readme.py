"""What the README says is done as it says."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def own_recipe() -> str:
  """The recipe shown under "Add your own method"."""
  found = re.search(
    r"<!-- own recipe -->\n```python\n(.*?)```\n<!-- end -->", README, re.DOTALL
  )
  assert found, "README.md has no block between the markers"
  return found.group(1)


@pytest.fixture
def environment(tmp_path):
  """Of a shell in which the README's `my_recipes.py` was saved and named."""
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "my_recipes.py").write_text(own_recipe())
  path = os.pathsep.join([str(folder), str(ROOT)])
  return {**os.environ, "TOKJAX_RECIPES": "my_recipes", "PYTHONPATH": path}


def run(environment, *arguments: str) -> str:
  done = subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
    capture_output=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


def test_own_recipe_is_at_most_twenty_lines():
  assert len(own_recipe().splitlines()) <= 20


def test_own_recipe_is_listed(environment):
  rows = run(environment, "-m", "tokjax.recipes").splitlines()
  assert any(row.startswith("longest\tvision\treduce\t") for row in rows)


@pytest.mark.slow
def test_own_recipe_obeys_the_laws(environment):
  shown = run(
    environment, "-m", "pytest", "tests/test_contract.py", "-q", "-k", "longest"
  )
  assert int(re.search(r"(\d+) passed", shown).group(1)) >= 10


@pytest.mark.slow
def test_own_recipe_takes_part_in_the_sweep(environment, tmp_path):
  shown = run(
    environment, "-m", "experiments.sweep",
    "--config", "configs/grid_pareto.py:runlocal",
    "--config.recipes=('longest',)", "--workdir", str(tmp_path),
  )  # fmt: skip
  assert re.search(r"longest \*? +\S", shown)
  assert (tmp_path / "pareto.png").exists()


def test_files_and_modules_that_it_names_exist():
  for name in re.findall(r"(?:configs|scripts|tests|docs)/[\w/]+\.\w+", README):
    assert (ROOT / name).exists(), name
  for name in re.findall(r"python -m (experiments\.\w+|tokjax\.\w+)", README):
    path = ROOT / name.replace(".", "/")
    assert path.with_suffix(".py").exists() or path.is_dir(), name


def test_table_of_systems_is_up_to_date():
  script = str(ROOT / "scripts" / "recipes_table.py")
  plain = {k: v for k, v in os.environ.items() if k != "TOKJAX_RECIPES"}
  run({**plain, "PYTHONPATH": str(ROOT)}, script, "--check")
