"""A page for each method, and their list."""

import multiprocessing
import pathlib
from collections.abc import Iterator
from concurrent import futures

from scripts.docs_site import attention, maps, measured
from scripts.recipes_table import families, table
from tokjax import recipes
from tokjax.recipes import pages

HEAD = """# Methods

Every method of the registry. Its page has the rule, the options, a picture of
what it does, its rows in the measured tables, and what it was checked against.
† has to be trained.
"""
ABOUT = {
  ("full", "none"): "The model as it is; there is nothing to show.",
  ("kivi", "zipcache"): "It stores every token, in fewer bits: what is read is"
  " what the full cache reads.",
  ("gemfilter", "promptdistill"): "It shortens the prompt between layers, which"
  " a map of one layer does not show.",
  ("fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus"): "It acts inside a"
  " language model that was trained to look at images; no such model is at"
  " hand.",
}


def write(folder: pathlib.Path, pictures: bool) -> list[dict]:
  """Writes the pages.

  Args:
    folder: of the pages; it is made.
    pictures: False leaves them out, which is quicker.

  Returns:
    Their part of the navigation.
  """
  folder.mkdir(parents=True)
  drawn = set(draw(folder)) if pictures else set()
  head, nav = [HEAD], []
  for title, found in families():
    rows, entries = [("method", "slots", "paper")], []
    for recipe in found:
      text = page(recipe, recipe.name in drawn)
      (folder / f"{recipe.name}.md").write_text(text)
      entries.append({recipe.name: f"methods/{recipe.name}.md"})
      mark = " †" * (recipe.training == "learned")
      slots = pages.slots_of(recipe()).replace(",", ", ")
      link = f"[`{recipe.name}`]({recipe.name}.md){mark}"
      rows.append((link, slots, recipe.paper))
    head.append(f"## {title}\n\n{table(rows)}\n")
    nav.append({title: entries})
  (folder / "index.md").write_text("\n".join(head))
  return ["methods/index.md", *nav]


def page(recipe: recipes.Recipe, drawn: bool) -> str:
  """The page of a method as Markdown."""
  shown = _picture(recipe, drawn)
  # The picture stands between what the rule is and the details.
  about, details = pages.markdown(recipe).split("\n\n- ", 1)
  details = f"- {details}"
  title = "" if recipe.paper == "-" else f"*{recipe.paper}*"
  parts = [f"# {recipe.name}", title, about, shown]
  if rows := measured.markdown(recipe):
    rows = f"## Measured\n\n{rows}"
    details = details.replace("## Evidence", f"{rows}\n\n## Evidence", 1)
  parts.append(details)
  return "\n\n".join(part for part in parts if part) + "\n"


def _picture(recipe: recipes.Recipe, drawn: bool) -> str:
  if drawn:
    on_image = recipe.family in ("baseline", "vision", "vlm")
    caption = maps.CAPTION if on_image else attention.CAPTION
    caption += maps.AT_END if recipe.family == "vlm" else ""
    return f"![What {recipe.name} does]({recipe.name}.png)\n\n*{caption}*"
  if recipe.training == "learned":
    return "*No picture: what it does has to be trained first.*"
  why = [text for names, text in ABOUT.items() if recipe.name in names]
  return f"*No picture. {why[0]}*" if why else ""


def draw(folder: pathlib.Path) -> Iterator[str]:
  """Draws what can be drawn, with two processes; yields names."""
  # Compiling takes the time, so that processes help and threads do not.
  fresh = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(2, mp_context=fresh) as pool:
    tasks = {
      name: pool.submit(draw_one, name, folder / f"{name}.png")
      for name in recipes.names()
    }
    for name, task in tasks.items():
      if task.result():
        yield name


def draw_one(name: str, path: pathlib.Path) -> bool:
  """Draws a method; False: it has no picture.

  Raises:
    RuntimeError: it could not be drawn; names the method.
  """
  recipe = recipes.find(name)
  try:
    return maps.draw(recipe, path) or attention.draw(recipe, path)
  except Exception as error:
    raise RuntimeError(f"picture of {name}: {error!r}") from error
