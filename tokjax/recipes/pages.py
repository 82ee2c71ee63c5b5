"""What is known of a recipe, as text for a terminal or as Markdown."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator

from tokjax.recipes.registry import Recipe
from tokjax.slots import TAKEN_BY, Slots

WIDTH = 80
# Options that mean the same in every recipe; others are in its docstring.
COMMON = {
  "keep": "fraction of tokens that remains; turns the budgets",
  "budget": "how many tokens remain, and where; see tokjax.budgets",
  "restore": "the grid is full again behind the last block: what was merged"
  " takes its token, what was dropped its last state",
}


@dataclasses.dataclass(frozen=True)
class Option:
  """One keyword argument of a recipe.

  Attributes:
    name, kind, default: as in its signature, the last two as text.
    meaning: from the docstring; "": it says nothing.
  """

  name: str
  kind: str
  default: str
  meaning: str

  @property
  def signature(self) -> str:
    return f"{self.name}: {self.kind} = {self.default}"


def slots_of(slots: Slots) -> str:
  """Names of the slots that are filled, comma separated.

  Those of a tower stand behind its name: "vision.reduce".
  """
  return ",".join(_filled(slots)) or "-"


def _filled(slots: Slots) -> list[str]:
  filled = ["reduce"] if slots.reduce else []
  if slots.attend is not None or slots.proportional:
    filled.append("attend")
  filled += [n for n in ("cache", "program") if getattr(slots, n) is not None]
  for tower, own in slots.towers:
    filled += [f"{tower}.{name}" for name in _filled(own)]
  return filled


def page(recipe: Recipe) -> str:
  """Rule, paper, options, evidence, deviations and BibTeX of a recipe."""
  rule, _ = documented(recipe)
  head = _wrapped(f"{recipe.name}: {recipe.paper}")
  known = "\n".join(_wrapped(f"{n}: {t}") for n, t in facts(recipe).items())
  choices = "\n".join(["Options", *map(_shown, options(recipe))])
  parts = [head, rule, known, choices]
  for title in ("evidence", "deviations"):
    if text := getattr(recipe, title):
      parts.append(_wrapped(f"{title.capitalize()}: {text}"))
  if recipe.paper != "-":
    parts.append(bibtex(recipe))
  return "\n\n".join(part for part in parts if part) + "\n"


def markdown(recipe: Recipe) -> str:
  """The same as the body of a Markdown page, without the titles."""
  rule, _ = documented(recipe)
  parts = [rule, _fact_list(recipe), "## Options", _option_list(recipe)]
  for title in ("evidence", "deviations"):
    if text := getattr(recipe, title):
      parts += [f"## {title.capitalize()}", _plain(text)]
  if recipe.paper != "-":
    parts += ["## Citation", f"```bibtex\n{bibtex(recipe)}\n```"]
  return "\n\n".join(part for part in parts if part) + "\n"


def facts(recipe: Recipe) -> dict[str, str]:
  """Family, slots, who takes them, and where paper and code are."""
  slots = recipe()
  taken = {f"{name}: {TAKEN_BY[name]}" for name in slots.filled()}
  found = {
    "family": recipe.family,
    "slots": slots_of(slots),
    "for": "; ".join(sorted(taken)),
    "training": recipe.training,
    "arXiv": recipe.arxiv and f"https://arxiv.org/abs/{recipe.arxiv}",
    "code": recipe.code and f"https://github.com/{recipe.code}",
  }
  return {name: text for name, text in found.items() if text}


def options(recipe: Recipe) -> Iterator[Option]:
  """The options: `keep`, those of the recipe's function, then `restore`."""
  _, meanings = documented(recipe)
  meanings = {**COMMON, **meanings}
  yield Option("keep", "float | None", "None", meanings["keep"])
  for option in inspect.signature(recipe.build).parameters.values():
    yield Option(
      option.name, _kind(option.annotation), repr(option.default),
      meanings.get(option.name, ""),
    )  # fmt: skip
  if "restore" in recipe.options:
    yield Option("restore", "bool", "False", meanings["restore"])


def documented(recipe: Recipe) -> tuple[str, dict[str, str]]:
  """The docstring without its section on arguments, and their meanings."""
  text = inspect.getdoc(recipe.build) or ""
  found = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
  if not found:
    return text, {}
  rest = text[: found.start()] + text[found.end() :]
  meanings = {}
  # Continued lines are indented further than the names.
  entries = re.split(r"^(?=\S)", textwrap.dedent(found[1]), flags=re.MULTILINE)
  for entry in filter(None, entries):
    names, _, meaning = entry.partition(":")
    for name in names.split(","):
      meanings[name.strip()] = " ".join(meaning.split()).removesuffix(".")
  return re.sub(r"\n{3,}", "\n\n", rest).strip(), meanings


def bibtex(recipe: Recipe) -> str:
  """An entry for the preprint; names of the authors are on its page."""
  lines = [f"  title = {{{recipe.paper}}},"]
  if recipe.year is not None:
    lines.append(f"  year = {{{recipe.year}}},")
  if recipe.arxiv:
    lines += [
      f"  eprint = {{{recipe.arxiv}}},",
      "  archivePrefix = {arXiv},",
      f"  url = {{https://arxiv.org/abs/{recipe.arxiv}}},",
    ]
  return "\n".join([f"@misc{{{recipe.name},", *lines, "}"])


def _kind(annotation) -> str:
  text = annotation
  if not isinstance(text, str):
    text = inspect.formatannotation(annotation)
  return text.replace("typing.", "").rsplit("budgets.base.", 1)[-1]


def _shown(option: Option) -> str:
  """A line for the option, and its meaning below."""
  lines = [_wrapped(f"  {option.signature}")]
  if option.meaning:
    lines.append(_wrapped(f"      {option.meaning}", indent=" " * 6))
  return "\n".join(lines)


def _fact_list(recipe: Recipe) -> str:
  """An item for each; links are links."""
  lines = []
  for name, text in facts(recipe).items():
    link = text.startswith("https://")
    shown = text.split("/", 3)[-1].removeprefix("abs/")
    text = f"[{shown}]({text})" if link else _plain(text)
    lines.append(f"- {name}: {text}")
  return "\n".join(lines)


def _option_list(recipe: Recipe) -> str:
  """An item for each, which fits a narrow page."""
  return "\n".join(
    f"- `{o.signature}`" + (f": {_plain(o.meaning)}" if o.meaning else "")
    for o in options(recipe)
  )


def _plain(text: str) -> str:
  """Text as Markdown shows it: words with signs of Markdown become code."""
  parts = text.split("`")
  # Outside of code marks, names with underscores, stars or brackets.
  for i in range(0, len(parts), 2):
    parts[i] = re.sub(r"([_*<>|\[\]])", r"\\\1", parts[i])
  return "`".join(parts)


def _wrapped(text: str, indent: str = "    ") -> str:
  return textwrap.fill(text, WIDTH, subsequent_indent=indent)
