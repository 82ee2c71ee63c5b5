"""Builds the documentation site into a folder, with warnings as errors.

  python -m scripts.docs_site                       build/site, with pictures
  python -m scripts.docs_site --no-pictures --out DIR

Pages of methods and of the API are written next to copies of docs/ in
build/pages, and MkDocs reads them there. Needs the extra `docs`; nothing is
downloaded. The links of what was built are checked (`scripts/check_site.py`).
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

from scripts import check_site
from scripts.docs_site import methods, reference

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ROOT / "build" / "pages"
CONFIG = ROOT / "build" / "mkdocs.yml"
GUIDE = [
  {"Home": "index.md"},
  {
    "Guide": [
      {"Score to plan in ten minutes": "ten_minutes.md"},
      {"Adding a method": "adding_methods.md"},
      {"Training a learned method": "training.md"},
      {"tokjax in your own model": "own_model.md"},
      {"From a laptop to a pod": "pod.md"},
    ]
  },
]
RESULTS = [
  {"Systems": "systems.md"},
  {"Caches and attention": "kv.md"},
  {"Learned methods": "learned.md"},
  {"Vision-language models": "vlm.md"},
  {"Retrieval by tokens": "retrieval.md"},
  {"Real models": "real_models.md"},
  {"Dense prediction": "dense.md"},
  {"Speed": "speed.md"},
  {"GPU kernels": "gpu_kernels.md"},
]


def write_pages(pictures: bool) -> list:
  """Writes everything that MkDocs reads; returns the navigation."""
  shutil.rmtree(PAGES, ignore_errors=True)
  shutil.copytree(ROOT / "docs", PAGES)
  # Under its own name: a README would be the page of all results.
  measured = PAGES / "measured"
  (measured / "README.md").rename(measured / "accelerators.md")
  return [
    *GUIDE,
    {"Methods": methods.write(PAGES / "methods", pictures)},
    {"Results": [*RESULTS, *map(titled, sorted(measured.glob("*.md")))]},
    {"API": reference.write(PAGES / "api")},
  ]


def titled(page: pathlib.Path) -> dict[str, str]:
  """A page in the navigation, by its first heading."""
  heading = page.read_text().partition("\n")[0].removeprefix("# ")
  return {heading: page.relative_to(PAGES).as_posix()}


def write_config(nav: list, out: pathlib.Path) -> None:
  """mkdocs.yml with the navigation and the folders of this checkout."""
  import yaml

  config = {
    "INHERIT": "../mkdocs.yml",
    "docs_dir": os.path.relpath(PAGES, CONFIG.parent),
    "site_dir": os.path.relpath(out, CONFIG.parent),
    "nav": nav,
    "plugins": {"mkdocstrings": {"handlers": {"python": {"paths": [".."]}}}},
  }
  CONFIG.write_text(yaml.safe_dump(config, sort_keys=False))


def build() -> None:
  """Runs MkDocs; ends the process if it warns of anything."""
  # Not --quiet, with which MkDocs does not count the warnings either.
  command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
  # The theme prints what comes after MkDocs 1 unless it is told not to.
  env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
  done = subprocess.run([*command, "-f", str(CONFIG)], cwd=ROOT, env=env)
  if done.returncode:
    sys.exit(done.returncode)


def main() -> None:
  """Writes, builds and checks."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument(
    "--out", type=pathlib.Path, default=ROOT / "build" / "site",
    help="folder of the site; what is in it is replaced",
  )  # fmt: skip
  parser.add_argument(
    "--pictures", action=argparse.BooleanOptionalAction, default=True,
    help="draw what methods do; takes most of the time",
  )  # fmt: skip
  given = parser.parse_args()
  out = given.out.resolve()
  write_config(write_pages(given.pictures), out)
  build()
  check_site.main([str(out)])


if __name__ == "__main__":
  main()
