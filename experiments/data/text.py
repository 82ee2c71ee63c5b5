"""Text as bytes or tokens, packed into windows of one length.

A corpus is one long array of bytes; a zero byte, which no text has, ends each
document. Windows are read by index, so that the position in an epoch is a
number. For a published model, documents are taken by its tokenizer, and its
end of text is what ends them.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.data import tfds_source
from experiments.data.errors import DataError
from tokjax import interop

Element = dict[str, Any]
VOCABULARY = 256
# Of a corpus without splits, one in so many documents is held out.
HELD_OUT = 20


@dataclasses.dataclass(frozen=True)
class Text:
  """Windows of bytes or tokens; corpora are subclasses.

  Attributes:
    length: of what the model reads; a window has one token more.
    heldout: at most so many windows are evaluated; None: all.
    tokenizer: published checkpoint whose tokenizer makes the ids, all at once
      in memory; None: bytes are the ids.
  """

  length: int = 128
  heldout: int | None = 512
  tokenizer: str | None = None

  @property
  def num_classes(self) -> int:
    """Number of ids."""
    if self.tokenizer is None:
      return VOCABULARY
    return interop.config_from(self.tokenizer).vocabulary

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f"length={self.length}: must be 1 or more")

  def corpus(self, split: str) -> np.ndarray:
    """Bytes of a split, `[bytes]` uint8."""
    raise NotImplementedError

  def source(self, split: str) -> Sequence[Element]:
    """Windows, as their split and place in the corpus."""
    limit = self.heldout if split == "test" else None
    if self.tokenizer is None:
      return Windows(self.corpus(split), self.length, limit)
    whole = dataclasses.replace(self, length=1, heldout=None)
    return Windows(_tokens(whole, split), self.length, limit)

  def for_tokenizer(self, checkpoint: str) -> "Text":
    """The same text as ids of the tokenizer in a published checkpoint's folder.

    Raises:
      DataError: it has no tokenizer.
    """
    if interop.inputs_of(checkpoint) is None:
      raise DataError(
        f"{checkpoint}: has no tokenizer.json; put the tokenizer of the"
        " checkpoint next to its weights"
      )
    return dataclasses.replace(self, tokenizer=checkpoint)

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """A window that begins at a random place within the indexed one."""
    start = element["start"] + int(rng.integers(self.length))
    return self.prepare({**element, "start": start})

  def prepare(self, element: Element) -> Element:
    """ "tokens" `[length + 1]`, int32."""
    corpus, start = element["corpus"], element["start"]
    start = min(start, len(corpus) - self.length - 1)
    window = corpus[start : start + self.length + 1]
    return {"tokens": np.asarray(window, np.int32)}


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """Starts of windows by index."""

  corpus: np.ndarray
  length: int
  limit: int | None

  def __post_init__(self):
    if len(self.corpus) <= self.length:
      raise DataError(
        f"the corpus has {len(self.corpus)} tokens; windows have"
        f" {self.length + 1}"
      )

  def __len__(self) -> int:
    count = (len(self.corpus) - 1) // self.length
    return count if self.limit is None else min(count, self.limit)

  def __getitem__(self, index: int) -> Element:
    return {"corpus": self.corpus, "start": index * self.length}


@dataclasses.dataclass(frozen=True)
class StandardLibrary(Text):
  """The source of Python's standard library; nothing is downloaded."""

  def corpus(self, split: str) -> np.ndarray:
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return _read(folder, ("*.py", "[!_st]*/*.py"), split)


@dataclasses.dataclass(frozen=True)
class LanguageReference(Text):
  """Prose: the chapters of Python's reference that its help shows.

  About 460 kB; one chapter in four is held out. Nothing is downloaded.
  """

  def corpus(self, split: str) -> np.ndarray:
    try:
      from pydoc_data.topics import topics
    except ImportError as error:
      raise DataError(
        f"language_reference: this Python comes without it ({error}); take"
        " folder_text"
      ) from error
    mine = [
      text.encode()
      for i, text in enumerate(topics.values())
      if (i % 4 == 0) == (split == "test")
    ]
    return np.frombuffer(b"".join(text + b"\0" for text in mine), np.uint8)


@dataclasses.dataclass(frozen=True)
class FolderText(Text):
  """Every file of a folder that matches; each is a document.

  Attributes:
    path: the folder.
    patterns: of files, relative to it.
  """

  path: str = "text"
  patterns: tuple[str, ...] = ("**/*.txt",)

  def corpus(self, split: str) -> np.ndarray:
    return _read(pathlib.Path(self.path), self.patterns, split)


@dataclasses.dataclass(frozen=True)
class TfdsText(Text):
  """A text builder of tensorflow-datasets, by name.

  Its documents are put together once, in a file under `cache`, which is then
  mapped into memory.

  Attributes:
    builder, train, test, data_dir: see `images.TfdsImages`.
    key: the feature with the text.
    cache: folder; None: ~/.cache/tokjax.
  """

  builder: str = "lm1b"
  train: str = "train"
  test: str = "test"
  data_dir: str | None = None
  key: str = "text"
  cache: str | None = None

  def corpus(self, split: str) -> np.ndarray:
    wanted = {"train": self.train, "test": self.test}[split]
    source = tfds_source.load(
      self.builder, wanted, self.data_dir, (("text", self.key),)
    )
    name = f"{self.builder} {wanted} {self.data_dir} {self.key} {len(source)}"
    name = hashlib.sha256(name.encode()).hexdigest()[:16]
    folder = pathlib.Path(self.cache or pathlib.Path.home() / ".cache/tokjax")
    path = folder / f"{name}.bytes"
    if not path.exists():
      _write(path, (source[i]["text"] for i in range(len(source))))
    return np.memmap(path, np.uint8, "r")


@functools.cache
def _tokens(text: Text, split: str) -> np.ndarray:
  """Ids of all documents, each followed by the end of a text."""
  tokenizer = interop.inputs_of(text.tokenizer)
  end, ids = list(tokenizer.ends[:1]), []
  for document in bytes(text.corpus(split)).split(b"\0"):
    if document:
      ids += tokenizer.encode(document.decode(errors="replace")) + end
  return np.asarray(ids, np.int32)


def _write(path: pathlib.Path, documents: Iterable[bytes | str]) -> None:
  """Documents into one file, which appears when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, part = tempfile.mkstemp(dir=path.parent)
  with os.fdopen(handle, "wb") as f:
    for text in documents:
      f.write(text.encode() if isinstance(text, str) else bytes(text))
      f.write(b"\0")
  os.replace(part, path)


@functools.cache
def _read(
  folder: pathlib.Path, patterns: tuple[str, ...], split: str
) -> np.ndarray:
  files = sorted({p for pattern in patterns for p in folder.glob(pattern)})
  files = [p for p in files if p.is_file()]
  if len(files) < HELD_OUT:
    raise DataError(
      f"{folder}: {len(files)} files match {patterns}; at least {HELD_OUT} are"
      " needed, one in so many is held out"
    )
  mine = [
    p for i, p in enumerate(files) if (i % HELD_OUT == 0) == (split == "test")
  ]
  return np.frombuffer(b"".join(p.read_bytes() + b"\0" for p in mine), np.uint8)
