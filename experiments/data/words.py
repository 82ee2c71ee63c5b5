"""Words as ids: the tokenizer of models that answer questions about images."""

import dataclasses
import functools
import re
from collections.abc import Sequence

PAD, START, END, IMAGE = range(4)
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
PART = re.compile(r"<image>|\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Words:
  """Every word of a small language is an id; so is a punctuation mark.

  Attributes:
    words: of the language, without those of `SPECIAL`, which come first.
  """

  words: tuple[str, ...]

  ends = (END,)
  chat = None

  @functools.cached_property
  def vocabulary(self) -> tuple[str, ...]:
    """The word of each id."""
    return (*SPECIAL, *self.words)

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.vocabulary)}

  def encode(self, text: str) -> list[int]:
    """Ids of a prompt, the start of a text first.

    Raises:
      ValueError: a word that the language does not have.
    """
    found = PART.findall(text.lower())
    if unknown := [word for word in found if word not in self._ids]:
      raise ValueError(
        f"prompt: {unknown[0]!r} is no word of this model; it knows"
        f" {', '.join(self.words)}"
      )
    return [START, *(self._ids[word] for word in found)]

  def encode_chat(self, messages: Sequence) -> list[int]:
    raise ValueError("a model of a few words has no chat template")

  def decode(self, ids: Sequence[int]) -> str:
    """The words with spaces between them; ids of `SPECIAL` are left out."""
    words = [self.vocabulary[i] for i in ids if i >= len(SPECIAL)]
    return " ".join(words)


class InWords:
  """What data sets have in common whose texts are in a small language.

  Attributes:
    words: the language.
  """

  words: Words

  @property
  def num_classes(self) -> int:
    """Ids there are."""
    return len(self.words.vocabulary)
