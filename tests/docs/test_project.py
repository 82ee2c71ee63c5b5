"""Files that describe the project agree with it."""

import configparser
import pathlib
import re

import tokjax
from tokjax import recipes
from tokjax.recipes import pages

ROOT = pathlib.Path(__file__).parents[2]


def extras() -> dict[str, str]:
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  return dict(config["options.extras_require"])


def test_packages_say_that_they_are_typed():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  for name in ("tokjax", "pallas_kernels"):
    assert config["options.package_data"][name] == "py.typed"
    assert (ROOT / name / "py.typed").exists()


def test_extras_agree_about_the_version_of_cuda():
  found = extras()
  versions = set(re.findall(r"cuda(\d+)", found["gpu"] + found["gpuaot"]))
  assert len(versions) == 1


def test_the_citation_is_of_this_version():
  cited = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {tokjax.__version__}\n" in cited
  assert "\nlicense: Apache-2.0\n" in cited


def test_files_that_contributing_names_exist():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  named = re.findall(r"`((?:tests|tokjax|scripts|configs)/[\w/*.]+)`", text)
  assert len(named) > 10
  for pattern in named:
    assert list(ROOT.glob(pattern)), pattern


def test_files_that_pages_of_the_site_name_exist():
  pages_of_guide = ("index", "ten_minutes", "training", "pod")
  for page in pages_of_guide:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    named = re.findall(r"(?:configs|scripts|tests)/[\w/]+\.\w+", text)
    for name in named:
      assert (ROOT / name).exists(), (page, name)
    for name in re.findall(r"python -m (experiments\.\w+)", text):
      assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name


def test_every_option_of_a_recipe_has_a_meaning():
  lacking = [
    (r.name, option.name)
    for r in recipes.registered()
    for option in pages.options(r)
    if not option.meaning
  ]
  assert not lacking
