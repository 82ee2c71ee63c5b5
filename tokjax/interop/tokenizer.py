"""Text to token ids and back, by a checkpoint's own tokenizer.json."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Published

from tokjax.interop import files

FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What generation needs of a tokenizer.

  Attributes:
    published: of the `tokenizers` library.
    ends: ids after which a text is complete.
  """

  published: Any
  ends: tuple[int, ...] = ()

  @classmethod
  def find(cls, folder: pathlib.Path) -> "Tokenizer | None":
    """The tokenizer of a checkpoint's folder; None if there is none.

    Raises:
      ValueError: the file is not one of the `tokenizers` library.
    """
    path = folder / FILE
    if not path.exists():
      return None
    try:
      published = Published.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
      raise ValueError(f"{path}: cannot be read ({error})") from error
    return cls(published, ends_of(folder))

  def encode(self, text: str) -> list[int]:
    """Ids of a text, with what the checkpoint puts in front of it."""
    return self.published.encode(text).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special tokens are left out."""
    return self.published.decode(list(ids))


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Bytes are ids: the tokenizer of models that were trained here."""

  ends: tuple[int, ...] = (0,)

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def ends_of(folder: pathlib.Path) -> tuple[int, ...]:
  """Ids that end a text, by generation_config.json or config.json."""
  for name in ("generation_config.json", "config.json"):
    if not (folder / name).exists():
      continue
    ends = files.read_json(folder / name).get("eos_token_id")
    if ends is not None:
      return tuple(ends) if isinstance(ends, list) else (ends,)
  return ()
