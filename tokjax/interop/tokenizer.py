"""Text to token ids and back, by a checkpoint's own tokenizer.json."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Published

from tokjax.interop import fields, files

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
  def find(
    cls, folder: pathlib.Path, vocabulary: int | None = None
  ) -> "Tokenizer | None":
    """The tokenizer of a checkpoint's folder; None if there is none.

    Args:
      folder: of the checkpoint.
      vocabulary: rows of the model's embedding, which ids must be below; None:
        not compared.

    Raises:
      ValueError: the file is not one of the `tokenizers` library, or it has
        ids that the model has no embedding for.
    """
    path = folder / FILE
    if not path.exists():
      return None
    try:
      published = Published.from_file(str(files.regular(path)))
    except files.CheckpointError:
      raise
    except Exception as error:  # the library raises nothing more precise
      raise ValueError(f"{path}: cannot be read ({error})") from error
    ends = ends_of(folder)
    if vocabulary is not None:
      check_ids(path, published.get_vocab(), ends, vocabulary)
    return cls(published, ends)

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


def check_ids(
  path: pathlib.Path,
  ids: Mapping[str, int],
  ends: Sequence[int],
  vocabulary: int,
) -> None:
  """Raises ValueError for ids at or above the rows of an embedding.

  Such ids would read rows that are not there. A tokenizer with fewer ids than
  rows is common: embeddings are padded to a multiple.
  """
  token = max(ids, key=ids.__getitem__, default=None)
  if token is not None and ids[token] >= vocabulary:
    raise ValueError(
      f"{path}: has ids up to {ids[token]} ({token!r}), the model's embedding"
      f" has {vocabulary} rows (ids up to {vocabulary - 1}); use the tokenizer"
      " that belongs to these weights"
    )
  if beyond := [end for end in ends if end >= vocabulary]:
    raise ValueError(
      f"{path.parent}: eos_token_id={beyond}, the model's embedding has"
      f" {vocabulary} rows (ids up to {vocabulary - 1})"
    )


def ends_of(folder: pathlib.Path) -> tuple[int, ...]:
  """Ids that end a text, by generation_config.json or config.json.

  Raises:
    ValueError: they are not integers of 0 or more.
  """
  for name in ("generation_config.json", "config.json"):
    if not (folder / name).exists():
      continue
    ends = files.read_json(folder / name).get("eos_token_id")
    if ends is not None:
      listed = ends if isinstance(ends, list) else [ends]
      if not all(fields.is_integer(end) and end >= 0 for end in listed):
        wrong = fields.wrong(
          "eos_token_id", ends, "an integer of 0 or more, or a list of them"
        )
        raise ValueError(f"{folder / name}: {wrong}")
      return tuple(listed)
  return ()
