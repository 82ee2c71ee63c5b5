"""What is known of a recipe, as text for a terminal."""

import inspect
import textwrap
from collections.abc import Iterator

from tokjax.recipes.registry import Recipe
from tokjax.slots import TAKEN_BY, Slots

WIDTH = 80


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
  rule = inspect.getdoc(recipe.build) or ""
  head = _wrapped(f"{recipe.name}: {recipe.paper}")
  parts = [head, rule, _facts(recipe)]
  if recipe.options:
    parts.append("\n".join(["Options", *_options(recipe)]))
  for title in ("evidence", "deviations"):
    if text := getattr(recipe, title):
      parts.append(_wrapped(f"{title.capitalize()}: {text}"))
  if recipe.paper != "-":
    parts.append(bibtex(recipe))
  return "\n\n".join(part for part in parts if part) + "\n"


def _facts(recipe: Recipe) -> str:
  """Family, slots, who takes them, and where paper and code are."""
  slots = recipe()
  taken = {f"{name}: {TAKEN_BY[name]}" for name in slots.filled()}
  facts = {
    "family": recipe.family,
    "slots": slots_of(slots),
    "for": "; ".join(sorted(taken)),
    "training": recipe.training,
    "arXiv": recipe.arxiv and f"https://arxiv.org/abs/{recipe.arxiv}",
    "code": recipe.code and f"https://github.com/{recipe.code}",
  }
  return "\n".join(
    _wrapped(f"{name}: {text}") for name, text in facts.items() if text
  )


def _options(recipe: Recipe) -> Iterator[str]:
  """A line for each option: name, type and default."""
  yield "  keep: float | None = None (fraction of tokens that remains)"
  for option in inspect.signature(recipe.build).parameters.values():
    kind = option.annotation
    kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    kind = kind.rsplit("budgets.base.", 1)[-1]
    yield _wrapped(f"  {option.name}: {kind} = {option.default!r}")


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


def _wrapped(text: str) -> str:
  return textwrap.fill(text, WIDTH, subsequent_indent="    ")
