"""Class folders and the labels of a model, matched by name.

Names are compared without regard to case, with underscores and hyphens as
spaces. A label of ImageNet is a list of synonyms, "tench, Tinca tinca"; a
folder may have any of them as its name, or all.
"""

from collections.abc import Callable, Mapping, Sequence

from experiments.data.errors import DataError

# Of a list in a message.
SHOWN = 8


def normalised(name: str) -> str:
  """A name as it is compared."""
  return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def synonyms(label: str) -> tuple[str, ...]:
  """The names that a label stands for, compared as they are."""
  return tuple(filter(None, map(normalised, label.split(","))))


def match(
  names: Sequence[str], labels: Sequence[str], where: str
) -> tuple[int, ...]:
  """The label of each name.

  A label that is the name, letter by letter, comes before one that is compared
  as above, and that before one with the name among its synonyms: two of
  ImageNet's labels have the synonym "crane".

  Args:
    names: of class folders.
    labels: of the model, in the order of its logits.
    where: the folder they are in, for messages.

  Raises:
    DataError: some names are no label, or one of several, or two are the same;
      shows both lists.
  """
  tables = [
    _index(labels, lambda label: (label,)),
    _index(labels, lambda label: (normalised(label),)),
    _index(labels, synonyms),
  ]
  found = [_of(name, tables) for name in names]
  absent = [n for n, ids in zip(names, found, strict=True) if not ids]
  if absent:
    raise DataError(
      f"{where}: {len(absent)} of {len(names)} class folders are no label:"
      f" {listed(absent)}; the {len(labels)} labels are: {listed(labels)}"
    )
  for name, ids in zip(names, found, strict=True):
    if len(ids) > 1:
      these = [f"{labels[i]!r} ({i})" for i in sorted(ids)]
      raise DataError(
        f"{where}: class folder {name!r} may be {' or '.join(these)}; give it"
        " the whole name of one"
      )
  chosen: dict[int, str] = {}
  for name, (i,) in zip(names, found, strict=True):
    if i in chosen:
      raise DataError(
        f"{where}: class folders {chosen[i]!r} and {name!r} are both the label"
        f" {labels[i]!r}"
      )
    chosen[i] = name
  return tuple(chosen)


def _index(
  labels: Sequence[str], names_of: Callable[[str], Sequence[str]]
) -> dict[str, set[int]]:
  """The labels that each name stands for."""
  found: dict[str, set[int]] = {}
  for i, label in enumerate(labels):
    for name in names_of(label):
      found.setdefault(name, set()).add(i)
  return found


def _of(name: str, tables: Sequence[Mapping[str, set[int]]]) -> set[int]:
  """The labels that a folder may be, by the first table that has any."""
  exact, whole, known = tables
  for table, key in ((exact, name), (whole, normalised(name))):
    if key in table:
      return table[key]
  # A folder that is a list of synonyms itself; a single name is a list of one.
  each = [known.get(part, set()) for part in synonyms(name)]
  return set.intersection(*each) if each else set()


def listed(names: Sequence[str]) -> str:
  """The first names, and how many more there are."""
  more = len(names) - SHOWN
  shown = ", ".join(repr(name) for name in names[:SHOWN])
  return f"{shown} and {more} more" if more > 0 else shown
