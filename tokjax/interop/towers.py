"""What layouts of vision-language models share: they have several towers."""

from collections.abc import Iterable
from typing import Any

from tokjax.interop.convert import Entry
from tokjax.interop.layout import Layout
from tokjax.models import VisionLanguage, VisionLanguageConfig
from tokjax.slots import Slots


class Towers(Layout):
  """A class of models made of towers."""

  holds = VisionLanguageConfig

  def build(
    self, config: VisionLanguageConfig, slots: Slots, dtype: Any
  ) -> VisionLanguage:
    """The model."""
    return VisionLanguage(config, slots, dtype)


def within(
  parts: Iterable[tuple[str, Iterable[Entry]]],
) -> list[Entry]:
  """Entries of towers, under the names of the whole model.

  Args:
    parts: names of towers, and the entries of each under its own names.
  """
  return [
    entry._replace(ours=tuple(f"{tower}/{name}" for name in entry.ours))
    for tower, entries in parts
    for entry in entries
  ]
