"""Writes the tables of systems from the registry of recipes.

  python scripts/recipes_table.py          rewrites them
  python scripts/recipes_table.py --check  fails if one is out of date

The short one stands in README.md between `<!-- recipes -->` and
`<!-- end recipes -->`; docs/systems.md says for each recipe also what it was
checked against and where it deviates.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

from tokjax import recipes
from tokjax.recipes.pages import slots_of
from tokjax.recipes.registry import FAMILIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
README, SYSTEMS = ROOT / "README.md", ROOT / "docs" / "systems.md"
START, END = "<!-- recipes -->", "<!-- end recipes -->"
TITLES = {
  "baseline": "Baselines",
  "vision": "Vision encoders",
  "llm": "Attention and prompts of language models",
  "cache": "KV caches of language models",
  "vlm": "Visual tokens in language models",
}
HEAD = """# Systems

Every registered recipe, what its rule was checked against, and where it
deviates from that. Written by `scripts/recipes_table.py`; "weak" means that no
fidelity is claimed.
"""


def families() -> Iterator[tuple[str, list[recipes.Recipe]]]:
  """Title and recipes of each family that has some."""
  known = {r.family for r in recipes.registered()}
  for family in sorted(known, key=FAMILIES.index):
    yield TITLES.get(family, family), list(recipes.registered(family))


def short() -> str:
  """A line for each family: names, with what has to be trained marked."""
  rows = [("family", "recipes")]
  for title, found in families():
    names = (
      f"`{r.name}`" + "\u00a0\u2020" * (r.training == "learned") for r in found
    )
    rows.append((title, ", ".join(names)))
  return table(rows) + "\n\n\u2020 has to be trained.\n"


def full() -> str:
  """A table for each family."""
  columns = "name slots training paper".split()
  columns += ["checked against", "deviations"]
  parts = [HEAD]
  for title, found in families():
    rows = [
      (f"`{r.name}`", slots_of(r()), r.training, paper_of(r), r.evidence,
       r.deviations or "-")
      for r in found
    ]  # fmt: skip
    parts.append(f"## {title}\n\n{table([columns, *rows])}\n")
  return "\n".join(parts)


def paper_of(recipe: recipes.Recipe) -> str:
  """Its title, linked to the preprint."""
  if not recipe.arxiv:
    return recipe.paper
  return f"[{recipe.paper}](https://arxiv.org/abs/{recipe.arxiv})"


def table(rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; the first row is the head."""
  rows = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
  return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(text: str) -> str:
  return text.replace("|", "\\|")


def readme(text: str) -> str:
  """The text with the table between the two markers, which must be there."""
  if text.count(START) != 1 or text.count(END) != 1:
    raise SystemExit(f"README.md: needs one line {START} and one {END}")
  head, rest = text.split(START)
  _, tail = rest.split(END)
  return f"{head}{START}\n{short()}{END}{tail}"


def main() -> None:
  """Rewrites or checks the two files."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--check", action="store_true")
  check = parser.parse_args().check
  for path, new in ((README, readme(README.read_text())), (SYSTEMS, full())):
    if not check:
      path.write_text(new)
    elif not path.exists() or path.read_text() != new:
      sys.exit(f"{path.name}: tables are out of date; run this script")


if __name__ == "__main__":
  main()
