"""Prompts from a file, and texts that end at a string."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is continued, or answered.

  Attributes:
    text: as it was given; of a conversation, its last message.
    messages: a conversation; None: `text` is all there is.
  """

  text: str
  messages: tuple[dict[str, str], ...] | None = None

  def encode(self, tokenizer: Any, chat: bool) -> list[int]:
    """Ids of it.

    Args:
      tokenizer: of the model.
      chat: a text alone is put to the model as a user's message.

    Raises:
      ValueError: a conversation, and the model has no chat template.
    """
    if self.messages is not None:
      return tokenizer.encode_chat(self.messages)
    if chat:
      return tokenizer.encode_chat([dict(role="user", content=self.text)])
    return tokenizer.encode(self.text)


def read(path: pathlib.Path) -> list[Prompt]:
  """Prompts of a file: one a line.

  A name that ends in .jsonl has objects, with "prompt", or with "messages" that
  have "role" and "content"; any other has texts. Empty lines are left out.

  Raises:
    OSError: it cannot be read.
    ValueError: it is not UTF-8, has no prompt, or a line is no such object.
  """
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: is not UTF-8 ({error.reason})") from error
  objects = path.suffix == ".jsonl"
  found = [
    from_json(line, f"{path}, line {i}") if objects else Prompt(line)
    for i, line in enumerate(lines, 1)
    if line.strip()
  ]
  if not found:
    raise ValueError(f"{path}: has no prompt")
  return found


def from_json(line: str, where: str) -> Prompt:
  """A prompt from a line of JSON."""
  try:
    value = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: is not JSON ({error})") from error
  if isinstance(value, dict) and isinstance(value.get("prompt"), str):
    return Prompt(value["prompt"])
  messages = value.get("messages") if isinstance(value, dict) else None
  if isinstance(messages, list) and messages and all(map(is_message, messages)):
    return Prompt(messages[-1]["content"], tuple(messages))
  raise ValueError(
    f'{where}: must be an object with "prompt", or with "messages" that have'
    ' "role" and "content"'
  )


def is_message(value: Any) -> bool:
  """True for a turn of a conversation."""
  return isinstance(value, dict) and all(
    isinstance(value.get(name), str) for name in ("role", "content")
  )


class Answer:
  """A text that grows by tokens, and ends at a token or a string.

  Attributes:
    ends: tokens that complete it.
    ids: so far.
    text: so far, without the string that it stopped at.
    stopped: why it ended: "end" (a token), "stop" (a string), or "length".
  """

  def __init__(
    self,
    decode: Callable[[Sequence[int]], str],
    ends: Sequence[int] = (),
    stops: Sequence[str] = (),
  ):
    self.ids: list[int] = []
    self.text, self.stopped = "", "length"
    self.ends, self._decode, self._stops = tuple(ends), decode, stops
    self._shown = 0

  @property
  def done(self) -> bool:
    """True once nothing more is added."""
    return self.stopped != "length"

  def add(self, token: int) -> str:
    """Takes a token; returns the text that is certain now and was not before.

    What may be the beginning of a stop string is held back, and so is a
    character of which some bytes are missing.
    """
    self.ids.append(token)
    self.text = self._decode(self.ids)
    places = [self.text.find(stop) for stop in self._stops]
    found = min((place for place in places if place >= 0), default=None)
    if found is not None:
      self.text, self.stopped = self.text[:found], "stop"
    elif token in self.ends:
      self.stopped = "end"
    if self.done:
      return self.rest()
    if self.text.endswith("\ufffd"):
      return ""
    return self._until(len(self.text) - self._held())

  def rest(self) -> str:
    """What was held back, once nothing follows."""
    return self._until(len(self.text))

  def _until(self, end: int) -> str:
    start, self._shown = self._shown, max(self._shown, end)
    return self.text[start:end]

  def _held(self) -> int:
    """Length of the longest end of the text that begins a stop string."""
    return max(
      (
        n
        for stop in self._stops
        for n in range(1, len(stop))
        if self.text.endswith(stop[:n])
      ),
      default=0,
    )
