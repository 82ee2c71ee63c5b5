"""Matplotlib, imported when something is drawn."""

from typing import Any


def matplotlib(*names: str) -> tuple[Any, ...]:
  """Modules of matplotlib by name, such as "figure" and "ticker".

  Raises:
    ImportError: it is not installed; the message says how to install it.
  """
  import importlib

  try:
    return tuple(importlib.import_module(f"matplotlib.{n}") for n in names)
  except ImportError as error:
    raise ImportError(
      "plots and pictures need matplotlib: pip install 'tokjax[experiments]'"
    ) from error


def figure(**options: Any) -> Any:
  """A `matplotlib.figure.Figure`, which needs no display."""
  (module,) = matplotlib("figure")
  return module.Figure(**options)
