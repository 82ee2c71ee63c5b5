"""Text to token ids and back, by a checkpoint's own tokenizer."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Published

from tokjax.interop import fields, files
from tokjax.interop.chat import Chat, Message, chosen

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What generation needs of a tokenizer.

  Attributes:
    published: of the `tokenizers` library.
    ends: ids after which a text is complete.
    chat: the template of conversations; None: there is none.
  """

  published: Any
  ends: tuple[int, ...] = ()
  chat: Chat | None = None

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
    return cls(published, ends, chat_of(folder))

  def encode(self, text: str) -> list[int]:
    """Ids of a text, with what the checkpoint puts in front of it."""
    return self.published.encode(text).ids

  def encode_chat(self, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation, up to where the answer begins.

    Args:
      messages: each with "role" and "content".

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    if self.chat is None:
      raise ValueError("this checkpoint has no chat template")
    text = self.chat.render(messages)
    # The template writes special tokens itself.
    return self.published.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special tokens are left out."""
    return self.published.decode(list(ids))


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Bytes are ids: the tokenizer of models that were trained here."""

  ends: tuple[int, ...] = (0,)
  chat: None = None

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def encode_chat(self, messages: Sequence[Message]) -> list[int]:
    raise ValueError("a model of bytes has no chat template")

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def check_ids(
  path: pathlib.Path | str,
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
      f"{path}: eos_token_id={beyond}, the model's embedding has"
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


def chat_of(folder: pathlib.Path) -> Chat | None:
  """The chat template of a folder.

  It is a file of its own, or an entry of tokenizer_config.json.

  Raises:
    ValueError: it is no template, or special tokens are no texts.
  """
  path, whole = folder / CONFIG, {}
  if path.exists():
    whole = files.read_json(path)
  if (folder / TEMPLATE).exists():
    template = files.read_text(folder / TEMPLATE)
  else:
    template = chosen(whole.get("chat_template"), str(path))
  if template is None:
    return None
  tokens = []
  for name in SPECIAL:
    token = whole.get(name)
    # Either the text, or an object that has it.
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is not None and not isinstance(text, str):
      wrong = fields.wrong(name, token, "a text, or an object with content")
      raise ValueError(f"{path}: {wrong}")
    if text is not None:
      tokens.append((name, text))
  return Chat(template, tuple(tokens))
