"""Pages of the API: which modules, under which title."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Title of a page, and the modules on it. Of a package, what it exports.
PAGES = {
  "Tokens and plans": ("tokjax.tokens", "tokjax.plan"),
  "Scores": ("tokjax.scores",),
  "Selection": ("tokjax.selection",),
  "Matching": ("tokjax.matching",),
  "Budgets": ("tokjax.budgets",),
  "Signals": ("tokjax.signals",),
  "Slots": ("tokjax.slots", "tokjax.layer", "tokjax.binding"),
  "Reduce": (
    "tokjax.reduce.reduction", "tokjax.reduce.site", "tokjax.reduce.rules",
    "tokjax.reduce.free", "tokjax.reduce.back",
  ),
  "Attention": (
    "tokjax.attention", "tokjax.attention.causal", "tokjax.attention.static",
    "tokjax.attention.estimated", "tokjax.attention.recalibrate",
  ),
  "Cache": (
    "tokjax.cache.kv", "tokjax.cache.prompted", "tokjax.cache.evict",
    "tokjax.cache.trim", "tokjax.cache.tally", "tokjax.cache.answers",
    "tokjax.cache.scores", "tokjax.cache.reads", "tokjax.cache.stores",
    "tokjax.cache.persistent", "tokjax.cache.combine",
  ),
  "Recipes": ("tokjax.recipes",),
  "Models": ("tokjax.models",),
  "Learned modules": ("tokjax.learned",),
  "Losses": ("tokjax.losses",),
  "Your own model": ("tokjax.foreign",),
  "Checkpoints": ("tokjax.interop",),
  "Small models": ("tokjax.zoo",),
  "Analysis": (
    "tokjax.analysis.cost", "tokjax.analysis.merge_map",
    "tokjax.analysis.gallery", "tokjax.analysis.pareto",
    "tokjax.analysis.plots", "tokjax.analysis.heatmaps",
    "tokjax.analysis.stand_in",
  ),
  "Kernels": ("pallas_kernels",),
  "Block layouts": ("pallas_kernels.layout",),
}  # fmt: skip
HEAD = """# API

Shapes are those of one example; `b` is put in front for a batch.

| letter | axis |
| --- | --- |
| `b` | examples |
| `n`, `m` | tokens before and after a plan |
| `f` | free tokens: those that are not protected |
| `r` | tokens that a plan removes |
| `d` | features |
| `h`, `k` | heads, features of a head |
| `p` | coordinates of a position |

"""


def write(folder: pathlib.Path) -> list:
  """Writes the pages; returns their part of the navigation."""
  folder.mkdir(parents=True)
  nav, lines = ["api/index.md"], ["| page | modules |", "| --- | --- |"]
  for title, modules in PAGES.items():
    name = title.lower().replace(" ", "_") + ".md"
    parts = [f"# {title}", *map(directive, modules)]
    (folder / name).write_text("\n\n".join(parts) + "\n")
    nav.append({title: f"api/{name}"})
    shown = ", ".join(f"`{module}`" for module in modules)
    lines.append(f"| [{title}]({name}) | {shown} |")
  (folder / "index.md").write_text(HEAD + "\n".join(lines) + "\n")
  return nav


def directive(module: str) -> str:
  """What mkdocstrings is asked for."""
  names = exported(module)
  if not names:
    return f"::: {module}"
  lines = [f"::: {module}", "    options:", "      members:"]
  return "\n".join([*lines, *(f"        - {name}" for name in names)])


def exported(module: str) -> list[str]:
  """Functions and classes that a package takes from its modules."""
  path = ROOT / module.replace(".", "/") / "__init__.py"
  if not path.exists():
    return []
  names = []
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.ImportFrom) and not _is_folder(node.module or ""):
      names += [alias.name for alias in node.names]
  return names


def _is_folder(module: str) -> bool:
  """Whether a module is a package, whose names are modules of their own."""
  return (ROOT / module.replace(".", "/") / "__init__.py").exists()
