"""Rows of the measured tables of docs/ that are about one method."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

from tokjax import recipes

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
# It repeats what a method's page says anyway.
NOT_MEASURED = ("systems.md",)


@dataclasses.dataclass(frozen=True)
class Table:
  """A Markdown table of a page.

  Attributes:
    page: name of the file.
    title: heading of the page.
    section: heading that the table stands under.
    rows: cells, the names of columns first.
  """

  page: str
  title: str
  section: str
  rows: tuple[tuple[str, ...], ...]

  @property
  def link(self) -> str:
    """Of the section, from a page in a folder next to it."""
    text = f"{self.title}, {self.section}"
    if self.section == self.title:
      return f"[{text[: len(self.title)]}](../{self.page})"
    return f"[{text}](../{self.page}#{anchor(self.section)})"


def anchor(heading: str) -> str:
  """Name that MkDocs gives to a heading."""
  text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
  return re.sub(r"[-\s]+", "-", text)


@functools.cache
def tables() -> tuple[Table, ...]:
  """All tables of docs/, in the order of pages."""
  pages = sorted(DOCS.glob("*.md"))
  found = [_of_page(p) for p in pages if p.name not in NOT_MEASURED]
  return tuple(table for page in found for table in page)


def _of_page(path: pathlib.Path) -> Iterator[Table]:
  title, section, rows, code = "", "", [], False
  for line in [*path.read_text().splitlines(), ""]:
    code ^= line.startswith("```")
    if not code and line.startswith("|"):
      rows.append(tuple(c.strip() for c in line.strip()[1:-1].split("|")))
      continue
    if len(rows) > 2:
      yield Table(path.name, title, section, (rows[0], *rows[2:]))
    rows = []
    if not code and line.startswith("#"):
      section = line.lstrip("# ").strip()
      title = title or section


def of(recipe: recipes.Recipe) -> Iterator[tuple[Table, list[tuple[str, ...]]]]:
  """Tables with a row of a method, and those rows."""
  for table in tables():
    rows = [row for row in table.rows[1:] if _is_about(row[0], recipe)]
    if rows:
      yield table, rows


def _is_about(cell: str, recipe: recipes.Recipe) -> bool:
  """Whether the first cell of a row names the method.

  By its name as code, or, of what is trained, as its paper writes it.
  """
  if recipe.name in re.findall(r"`([^`]+)`", cell):
    return True
  letters = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())
  trained = recipe.training != "training-free"
  return trained and letters(cell.split(",")[0]) == letters(recipe.name)


def markdown(recipe: recipes.Recipe) -> str:
  """The rows as Markdown, each table with a link to its page."""
  parts = []
  for table, rows in of(recipe):
    head = table.rows[0]
    lines = [head, ("---",) * len(head), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts.append(f"{table.link}:\n\n{text}")
  return "\n\n".join(parts)
