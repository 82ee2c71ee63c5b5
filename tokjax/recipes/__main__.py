"""Lists recipes, or prints what is known of some.

  python -m tokjax.recipes                    a row for each, tab-separated
  python -m tokjax.recipes tome               rule, paper, options, BibTeX
  python -m tokjax.recipes evit+tome          the same of both
  python -m tokjax.recipes token merging      those with these words in titles
  python -m tokjax.recipes 2404.14469         that of a preprint

On a terminal the table is short and fits its width; in a pipe it is whole.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence

from tokjax import recipes
from tokjax.recipes.pages import WIDTH, page, slots_of

HEADER = (
  "name family slots training paper evidence deviations arxiv year code"
)


def rows() -> Iterator[str]:
  """The whole table, tab-separated, a header first."""
  yield "\t".join(HEADER.split())
  for r in recipes.registered():
    row = (r.name, r.family, slots_of(r()), r.training, r.paper, r.evidence,
           r.deviations, r.arxiv, str(r.year or ""), r.code)  # fmt: skip
    yield "\t".join(field or "-" for field in row)


def short_rows(found: Sequence[recipes.Recipe]) -> Iterator[str]:
  """Name, slots and paper, as wide as the terminal; a long title is cut."""
  width = shutil.get_terminal_size((WIDTH, 24)).columns
  slots = {r.name: slots_of(r()) for r in found}
  names, filled = (max(map(len, x)) + 2 for x in (slots, slots.values()))
  for r in found:
    line = f"{r.name:{names}}{slots[r.name]:{filled}}{r.paper}"
    yield line if len(line) <= width else line[: width - 3] + "..."


def main(words: Sequence[str] | None = None) -> None:
  """Writes to standard output; ends quietly if that is closed."""
  words = sys.argv[1:] if words is None else words
  try:
    sys.stdout.write(_answer(words))
    sys.stdout.flush()
  except BrokenPipeError:
    # What Python would still write at its end goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(words: Sequence[str]) -> str:
  text = " ".join(words)
  if words and words[0] in ("-h", "--help"):
    return __doc__
  if not words:
    table = short_rows(recipes.registered()) if sys.stdout.isatty() else rows()
    return "\n".join(table) + "\n"
  found = recipes.search(text)
  if not found:
    try:
      known = recipes.find(text)
    except (KeyError, ValueError) as error:
      sys.exit(f"error: {error.args[0]}")
    if isinstance(known, recipes.Joined):
      return "\n\n".join(map(page, known.parts))
  if len(found) == 1:
    return page(found[0])
  return "\n".join(short_rows(found)) + "\n"


if __name__ == "__main__":
  main()
