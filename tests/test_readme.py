"""What the README says is done as it says."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from experiments import pictures
from tests.contract.hosts import VISION
from tests.decoder.models import config, decoder, params_of
from tokjax import interop, recipes
from tokjax.interop.tokenizer import Bytes
from tokjax.recipes import registry
from tokjax.slots import Slots

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def own_recipe(marker: str = "own recipe", text: str = README) -> str:
  """A recipe shown under "Add your own method"."""
  found = re.search(
    rf"<!-- {marker} -->\n```python\n(.*?)```\n<!-- end -->", text, re.DOTALL
  )
  assert found, f"no block {marker!r} between markers"
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
  # In one of its hosts; recipes that are shipped are in all of theirs.
  shown = run(
    environment, "-m", "pytest", "tests/test_contract.py", "-q", "-k",
    "longest-vit_mean",
  )  # fmt: skip
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


def test_own_cache_is_the_document_s():
  """Which tests/test_adding_methods.py holds to the laws."""
  document = (ROOT / "docs/adding_methods.md").read_text()
  assert own_recipe("own cache") == own_recipe("short cache", document)


def small(checkpoint: str, *, slots: Slots):
  """`interop.load` of a small model of the checkpoint's kind, not trained."""
  if "deit" in checkpoint:
    host = VISION[0]
    model = host.build(slots)
    half = (0.5, 0.5, 0.5)
    how = interop.Preprocessing(mean=half, std=half, image_size=16)
    return model, host.params(model), how
  vocabulary = {"vocabulary": 256}
  model = decoder(slots, **vocabulary)
  return model, params_of(config(**vocabulary)), Bytes(ends=())


@pytest.fixture
def snippets(monkeypatch):
  """Runs each Python block of the README as pasted; yields what they define."""
  monkeypatch.setattr(interop, "load", small)
  monkeypatch.chdir(ROOT)
  known, found = set(recipes.names()), []
  for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
    names = {"__name__": "pasted"}
    exec(compile(code, "README.md", "exec"), names)
    found.append(names)
  yield found
  for name in set(recipes.names()) - known:
    del registry._RECIPES[name]


def test_every_python_snippet_runs_when_pasted(snippets, capsys):
  vision, language, *own = snippets
  assert vision["logits"].shape == (1, 5)
  assert vision["out"]["tokens"].num_tokens < 30
  assert len(language["texts"][0]) == 128
  assert {"longest", "last_row"} <= set(recipes.names())
  assert len(own) == 2


def test_the_picture_command_draws_the_picture(tmp_path):
  command = re.search(r"`python -m experiments\.pictures (.*?)`", README)
  asked = re.findall(r"--(\w+) (\S+)", command.group(1))
  options = {n: v for n, v in asked if n not in ("out", "block")}
  kinds = {"recipe": str, "keep": float, "size": int, "patch": int}
  options = {name: kinds[name](value) for name, value in options.items()}
  photographs = datasets.load_sample_images()
  at = [n.endswith("flower.jpg") for n in photographs.filenames].index(True)
  photograph = tmp_path / "flower.png"
  Image.fromarray(photographs.images[at]).save(photograph)
  blocks = [int(v) for n, v in asked if n == "block"]
  pictures.main(out=tmp_path, images=[photograph], blocks=blocks, **options)
  drawn = np.asarray(Image.open(tmp_path / "flower_tome.png"), np.int32)
  shown = np.asarray(Image.open(ROOT / "docs/flower_tome.png"), np.int32)
  assert drawn.shape == shown.shape
  # Another font or version of the plotting library moves letters at most.
  assert (np.abs(drawn - shown).max(axis=-1) > 8).mean() < 0.03


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
