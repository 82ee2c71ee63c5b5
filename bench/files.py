"""Files of results."""

import os
import pathlib


def write(path: pathlib.Path, text: str) -> None:
  """Writes the file whole; a reader never sees half of it."""
  new = path.with_suffix(".new")
  new.write_text(text)
  os.replace(new, path)
