"""The registry of recipes: one short function per published method."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tokjax.budgets import check_keep
from tokjax.recipes.joining import compose as compose_slots
from tokjax.slots import Slots

FAMILIES = ("baseline", "vision", "vlm", "video", "llm", "cache", "bytes")
# Of encoders: their recipes have the option `restore`.
RESTORABLE = ("baseline", "vision")
TRAINING = ("training-free", "learned", "both")


class UnknownOption(TypeError):
  """An option that a recipe does not have."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A method: the function that fills the slots, and where it comes from.

  Attributes:
    name: how users ask for it.
    family: one of `FAMILIES`.
    paper: title of the publication.
    training: one of `TRAINING`.
    evidence: what the rule was checked against.
    deviations: where it differs from that, and why.
    build: the function; its keyword arguments are the options.
    arxiv: number of the preprint, "2210.09461"; "": none.
    year: of publication, by default of the preprint; None: a definition.
    code: official repository, "owner/name"; "": none is public.
  """

  name: str
  family: str
  paper: str
  training: str
  evidence: str
  deviations: str
  build: Callable[..., Slots]
  arxiv: str = ""
  year: int | None = None
  code: str = ""

  @property
  def options(self) -> tuple[str, ...]:
    own = tuple(inspect.signature(self.build).parameters)
    return (*own, "restore") if self.family in RESTORABLE else own

  def __call__(self, *, keep: float | None = None, **options) -> Slots:
    """Builds the slots.

    Args:
      keep: turns budgets to end at that fraction.
      **options: of the function; and of a recipe for encoders `restore`, True:
        the grid is full again behind the last block, see `Slots.restored`.
    """
    unknown = [name for name in options if name not in self.options]
    if unknown:
      raise UnknownOption(
        f"recipe {self.name!r}: unknown option {unknown[0]!r}; its options are"
        f" keep, {', '.join(self.options)}"
      )
    restore = options.pop("restore", False)
    if not isinstance(restore, bool):
      raise ValueError(f"restore={restore!r}: must be True or False")
    slots = self.build(**options).named(self.name)
    slots = slots.restored() if restore else slots
    return slots if keep is None else slots.with_keep(keep)


_RECIPES: dict[str, Recipe] = {}


def recipe(
  name: str,
  *,
  family: str,
  paper: str,
  training: str = "training-free",
  evidence: str = "a definition",
  deviations: str = "",
  arxiv: str = "",
  year: int | None = None,
  code: str = "",
) -> Callable[[Callable[..., Slots]], Callable[..., Slots]]:
  """Registers a function that returns `Slots` under `name`; see `Recipe`."""
  if family not in FAMILIES:
    raise ValueError(f"family={family!r}: must be one of {FAMILIES}")
  if training not in TRAINING:
    raise ValueError(f"training={training!r}: must be one of {TRAINING}")
  if arxiv and not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
    raise ValueError(f"arxiv={arxiv!r}: must be a number such as '2210.09461'")
  if arxiv and year is None:
    year = 2000 + int(arxiv[:2])

  def register(build):
    known = _RECIPES.get(name)
    if known is not None and (
      known.build.__module__,
      known.build.__qualname__,
    ) != (build.__module__, build.__qualname__):
      raise ValueError(
        f"recipe {name!r} is already registered by {known.build.__module__}"
      )
    _RECIPES[name] = Recipe(
      name, family, paper, training, evidence, deviations, build, arxiv, year,
      code,
    )  # fmt: skip
    return build

  return register


def registered(family: str | None = None) -> tuple[Recipe, ...]:
  """All recipes, or those of a family, in the order of registration."""
  return tuple(r for r in _RECIPES.values() if family in (None, r.family))


def names(family: str | None = None) -> tuple[str, ...]:
  """Their names."""
  return tuple(r.name for r in registered(family))


@dataclasses.dataclass(frozen=True)
class Joined:
  """Several recipes as one: what `find("evit+tome")` gives.

  Attributes:
    parts: in the order in which they act.
    shares: how one keep ratio is shared out: each part is given `keep` to the
      power of its share, so that the product is `keep`; None: a part that keep
      ratios do not turn. (): see `Slots.with_keep`.
  """

  parts: tuple[Recipe, ...]
  shares: tuple[Fraction | None, ...] = ()

  @property
  def name(self) -> str:
    shares = self.shares or (None,) * len(self.parts)
    return "+".join(
      part.name if share is None else f"{part.name}^{share}"
      for part, share in zip(self.parts, shares, strict=True)
    )

  @property
  def family(self) -> str:
    """That of the last part."""
    return self.parts[-1].family

  def _of_all(self, field: str) -> str:
    found = [f"{part.name}: {getattr(part, field)}" for part in self.parts]
    return "; ".join(found)

  @property
  def paper(self) -> str:
    return self._of_all("paper")

  @property
  def evidence(self) -> str:
    return self._of_all("evidence")

  @property
  def deviations(self) -> str:
    return self._of_all("deviations")

  @property
  def training(self) -> str:
    """Whether a part has to be trained: "learned", or "training-free"."""
    found = {part.training for part in self.parts}
    return "learned" if "learned" in found else "training-free"

  @property
  def options(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(o for part in self.parts for o in part.options))

  def __call__(self, *, keep: float | None = None, **options) -> Slots:
    """Builds the slots; each part takes the options that it has."""
    unknown = [name for name in options if name not in self.options]
    if unknown:
      raise UnknownOption(
        f"recipe {self.name!r}: unknown option {unknown[0]!r}; its options are"
        f" keep, {', '.join(self.options)}"
      )
    own = lambda r: {o: v for o, v in options.items() if o in r.options}
    parts = [part(**own(part)) for part in self.parts]
    if not self.shares:
      slots = compose_slots(*parts)
      return slots if keep is None else slots.with_keep(keep)
    if keep is None:
      raise ValueError(
        f"recipe {self.name!r} shares out a keep ratio: give keep"
      )
    check_keep(keep)
    for i, (part, share) in enumerate(zip(parts, self.shares, strict=True)):
      if (share is not None) != part.follows_keep:
        raise ValueError(
          f"recipe {self.name!r}: {part.name!r} "
          + ("is not turned by a keep ratio; leave out its share"
             if share else "is turned by a keep ratio, and has no share of it")
        )  # fmt: skip
      if share is not None:
        parts[i] = part.with_keep(float(keep) ** float(share))
    return compose_slots(*parts)


def search(text: str) -> tuple[Recipe, ...]:
  """Recipes by name, arXiv number, or words of name and title; any case."""
  text = text.lower().strip()
  words = lambda text: set(re.findall(r"\w+", text.lower()))
  every, asked = registered(), words(text)
  by_name = [r for r in every if r.name == text.replace("-", "_")]
  by_number = [r for r in every if r.arxiv and r.arxiv in text]
  # "0" or "of" alone says nothing about a title.
  by_title = [
    r
    for r in every
    if any(len(word) > 2 for word in asked)
    and asked <= words(f"{r.name} {r.paper}")
  ]
  return tuple(by_name or by_number or by_title)


def find(name: str) -> Recipe | Joined:
  """A recipe, or several that are joined by "+".

  Args:
    name: its name, in any case; or what only it is found by with `search`. Of
      several each may have a share of the keep ratio: "divprune^1/2+fastv^1/2";
      see `Joined`.

  Raises:
    KeyError: there is none, or more than one; names near ones.
    ValueError: shares that are no positive numbers, or do not sum to 1.
  """
  if "+" not in name:
    return _one(name)
  names, shares = zip(*map(_shared, name.split("+")), strict=True)
  parts = tuple(map(_one, names))
  if not any(shares):
    return Joined(parts)
  if sum(filter(None, shares)) != 1:
    said = ", ".join(str(share) for share in shares if share)
    raise ValueError(f"recipe {name!r}: shares {said} must sum to 1")
  return Joined(parts, shares)


def _shared(text: str) -> tuple[str, Fraction | None]:
  """A name and its share, if it has one."""
  name, mark, share = text.partition("^")
  if not mark:
    return text.strip(), None
  try:
    value = Fraction(share.strip())
  except (ValueError, ZeroDivisionError):
    value = Fraction(0)
  if value <= 0:
    raise ValueError(
      f"recipe {text.strip()!r}: the share {share!r} of the keep ratio must be"
      ' a positive number, as in "tome^1/2"'
    )
  return name.strip(), value


def _one(name: str) -> Recipe:
  if name in _RECIPES:
    return _RECIPES[name]
  found = search(name)
  if len(found) == 1:
    return found[0]
  if found:
    names = ", ".join(r.name for r in found)
    raise KeyError(f"{name!r} may be any of the recipes {names}; name one")
  near = difflib.get_close_matches(name.lower(), _RECIPES, n=3)
  hint = f"; did you mean {' or '.join(near)}?" if near else "."
  raise KeyError(
    f"unknown recipe {name!r}{hint} Known are: {', '.join(_RECIPES)}"
  )


def get(name: str, **options: Any) -> Slots:
  """The slots of a recipe, or of several as one.

  Args:
    name: one of `names()`, or several joined by "+", in the order in which
      they act: "evit+tome", "fastv+snapkv+kivi"; with shares of the keep ratio,
      "fastv^1/3+snapkv^2/3+kivi" (see `Joined`).
    **options: `keep` (fraction of tokens that remain at the end), for encoders
      `restore` (see `Slots.restored`), and the recipe's own; of several
      recipes each takes the options that it has.

  Raises:
    KeyError: no such recipe.
    UnknownOption: no such option.
    ValueError: an option out of range, or recipes that do not go together.
  """
  return find(name)(**options)


def compose(*parts: str | Slots, keep: float | None = None) -> Slots:
  """Several recipes as one `Slots`, in the order in which they act.

  Args:
    *parts: names of recipes, or slots with options of their own.
    keep: fraction of tokens that remains in all; None: as the parts say.

  Raises:
    KeyError: no such recipe.
    ValueError: recipes that do not go together; names both and the slot.
  """
  slots = compose_slots(*(get(p) if isinstance(p, str) else p for p in parts))
  return slots if keep is None else slots.with_keep(keep)
