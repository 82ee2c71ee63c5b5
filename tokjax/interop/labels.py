"""Names of a checkpoint's classes, in the order of its logits."""

import re
from collections.abc import Sequence
from typing import Any

from tokjax.interop import fields
from tokjax.interop.fields import Json

# What `transformers` writes where nobody named the classes.
UNNAMED = re.compile(r"LABEL_\d+")


def unnamed(count: int) -> tuple[str, ...]:
  """The names of classes that nobody named."""
  return tuple(f"LABEL_{i}" for i in range(count))


def by_id(names: Sequence[str]) -> dict[str, Any]:
  """`id2label` and `label2id` of config.json; of equal names the last id."""
  return {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }


def read(whole: Json) -> tuple[str, ...]:
  """The names in a config.json of `transformers` or timm; (): it has none.

  Raises:
    ValueError: names of other ids than 0, 1, ..., or that are no text.
  """
  if whole.get("id2label") is not None:
    found = fields.mapping(whole, "id2label")
    ids = [str(i) for i in range(len(found))]
    if set(found) != set(ids) or not all(map(_is_text, found.values())):
      raise fields.wrong("id2label", found, "names of the ids 0, 1, ...")
    names = tuple(found[i] for i in ids)
    return () if all(map(UNNAMED.fullmatch, names)) else names
  for part in (whole, fields.mapping(whole, "pretrained_cfg")):
    if part.get("label_names") is not None:
      names = fields.strings(part, "label_names")
      said = part.get("label_descriptions")
      if not isinstance(said, dict):
        return names
      # ImageNet in timm: names are ids of WordNet, descriptions are words.
      return tuple(
        ", ".join(dict.fromkeys(x for x in (said.get(n), n) if _is_text(x)))
        for n in names
      )
  return ()


def _is_text(value: Any) -> bool:
  return isinstance(value, str)
