"""Prints one tab-separated row for every recipe."""

from tokjax import recipes
from tokjax.slots import Slots


def slots_of(recipe: recipes.Recipe) -> str:
  """Names of the slots that a recipe fills, comma separated.

  Those of a tower stand behind its name: "vision.reduce".
  """
  return ",".join(_filled(recipe())) or "-"


def _filled(slots: Slots) -> list[str]:
  filled = ["reduce"] if slots.reduce else []
  if slots.attend is not None or slots.proportional:
    filled.append("attend")
  filled += [n for n in ("cache", "program") if getattr(slots, n) is not None]
  for tower, own in slots.towers:
    filled += [f"{tower}.{name}" for name in _filled(own)]
  return filled


def main() -> None:
  """Writes the table to standard output, a header first."""
  header = "name family slots training paper evidence deviations"
  print("\t".join(header.split()))
  for name in recipes.names():
    r = recipes.find(name)
    row = (r.name, r.family, slots_of(r), r.training, r.paper, r.evidence)
    print("\t".join([*row, r.deviations or "-"]))


if __name__ == "__main__":
  main()
