"""What is installed with tokjax, and what `import tokjax` loads."""

import ast
import configparser
import fnmatch
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tokjax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Distributions whose modules have another name.
MODULES = {
  "absl-py": "absl", "orbax-checkpoint": "orbax", "pillow": "PIL",
  "scikit-learn": "sklearn", "tensorflow-datasets": "tensorflow_datasets",
}  # fmt: skip
LAZY = ("PIL", "grain", "huggingface_hub", "matplotlib", "orbax", "tokenizers")


def setup() -> configparser.ConfigParser:
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  return config


def modules(requirements: str) -> set[str]:
  """Names of modules of a list of requirements."""
  names = re.findall(r"^\s*([\w-]+)", requirements, re.MULTILINE)
  return {MODULES.get(name, name) for name in names}


def imported(folder: str) -> dict[str, str]:
  """Modules from elsewhere that a folder imports, and a file that does."""
  own = {path.stem for path in ROOT.iterdir()} | {"libtpu"}
  found = {}
  for path in (ROOT / folder).rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
      for name in names:
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in own:
          found[top] = str(path.relative_to(ROOT))
  return found


def run(code: str):
  """The JSON that a fresh interpreter prints."""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
    check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("folder", ["tokjax", "pallas_kernels"])
def test_what_the_library_imports_is_installed_with_it(folder):
  required = modules(setup()["options"]["install_requires"])
  unknown = {m: p for m, p in imported(folder).items() if m not in required}
  assert not unknown


@pytest.mark.parametrize("folder", ["experiments", "configs"])
def test_what_experiments_import_is_in_their_extra(folder):
  config = setup()
  known = modules(config["options"]["install_requires"])
  known |= modules(config["options.extras_require"]["experiments"])
  known |= {"torch"}  # a benchmark compares with it where it is installed
  unknown = {m: p for m, p in imported(folder).items() if m not in known}
  assert not unknown


def test_nothing_is_required_twice():
  config = setup()
  required = modules(config["options"]["install_requires"])
  extra = modules(config["options.extras_require"]["experiments"])
  assert not required & extra


def test_importing_it_is_quick_and_loads_nothing_heavy():
  """CPU time, so that a loaded machine does not count."""
  code = f"""
import json, sys, time
import jax, flax
before = time.process_time()
import tokjax
seconds = time.process_time() - before
import tokjax.models, tokjax.recipes, tokjax.losses, pallas_kernels
import tokjax.analysis.plots, tokjax.analysis.gallery, tokjax.analysis.heatmaps
print(json.dumps([seconds, [m for m in {LAZY} if m in sys.modules]]))
"""
  seconds, heavy = run(code)
  assert seconds < 1
  assert heavy == []


def test_plots_say_which_extra_they_need():
  code = """
import json, pathlib, sys
sys.modules["matplotlib"] = None  # as if it were not installed
from tokjax.analysis import heatmaps
try:
  heatmaps.draw_recall({"a": [[1.0]]}, [8], [0.5], pathlib.Path("x"), title="")
except ImportError as error:
  print(json.dumps(str(error)))
"""
  assert run(code) == (
    "plots and pictures need matplotlib: pip install 'tokjax[experiments]'"
  )


def test_experiments_say_which_extra_they_need():
  code = """
import json, sys
sys.modules["ml_collections"] = None
try:
  import experiments
except ImportError as error:
  print(json.dumps(str(error)))
"""
  assert "pip install 'tokjax[experiments]'" in run(code)


def test_the_command_runs_the_experiments_of_the_checkout(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "tokjax", "runner", "--help"], cwd=tmp_path,
    text=True, capture_output=True, check=False,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert "--seeds" in done.stdout, done.stderr[-3000:]
  assert set(cli.EXPERIMENTS) <= {
    path.stem for path in (ROOT / "experiments").glob("*.py")
  }


def test_the_command_says_what_is_not_installed(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["tokjax"])
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.setattr(
    cli.runpy, "run_module", lambda *_, **__: importlib.import_module("no_such")
  )
  with pytest.raises(SystemExit) as end:
    cli.main(["train"])
  assert end.value.code == (
    "error: No module named 'no_such': pip install 'tokjax[experiments]'"
  )
  monkeypatch.setattr(cli, "home_of_experiments", lambda: None)
  with pytest.raises(SystemExit, match="holds no experiments"):
    cli.main(["sweep"])


def test_the_wheel_carries_experiments_and_configs(tmp_path):
  """Built from a copy, so that nothing is left in the checkout."""
  pytest.importorskip("setuptools", reason="environments of 3.12 lack it")
  source, lib = tmp_path / "source", tmp_path / "lib"
  for name in ("tokjax", "pallas_kernels", "experiments", "configs"):
    shutil.copytree(ROOT / name, source / name)
  for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md"):
    shutil.copy(ROOT / name, source)
  done = subprocess.run(
    [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)],
    cwd=source, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert {path.name for path in lib.iterdir()} == {"tokjax", "pallas_kernels"}
  for name in ("experiments", "configs"):
    files = lambda top: {
      str(path.relative_to(top))
      for path in top.rglob("*")
      if path.is_file() and "__pycache__" not in path.parts
    }
    assert files(lib / "tokjax" / "shipped" / name) == files(ROOT / name)


def test_only_tokjax_and_pallas_kernels_are_installed():
  patterns = setup()["options.packages.find"]["include"].split()
  packages = [
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in ROOT.rglob("__init__.py")
    if not path.relative_to(ROOT).parts[0].startswith(".")
  ]
  matches = lambda name: any(fnmatch.fnmatch(name, p) for p in patterns)
  found = {name for name in packages if matches(name)}
  assert {name.partition(".")[0] for name in found} == {
    "tokjax", "pallas_kernels",
  }  # fmt: skip
  for top in ("tokjax", "pallas_kernels"):
    for path in (ROOT / top).rglob("*.py"):
      name = ".".join(path.parent.relative_to(ROOT).parts)
      assert name in found, f"{path}: its folder has no __init__.py"
