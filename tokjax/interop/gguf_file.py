"""GGUF files: metadata and tensors, checked before anything is allocated.

The header is read here and not by `gguf.GGUFReader`, which trusts the counts in
a file (an array that claims 2^60 entries fills the memory) and makes several
arrays for each token of the vocabulary. What the bytes of a tensor mean is left
to the `gguf` package (`pip install "tokjax[gguf]"`), which knows every
quantisation of llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2
and 3, little-endian.
"""

import dataclasses
import functools
import importlib
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokjax.interop import files
from tokjax.interop.tensors import CheckpointError, Header

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Codes of metadata types. UINT8, INT8, UINT16, ... as `struct` writes them.
SCALARS = {
  0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q",
  11: "q", 12: "d",
}  # fmt: skip
FLOAT32, STRING, ARRAY = 6, 8, 9
# The least bytes of an entry: name, type and value; name, axes, type, place.
LEAST_VALUE, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
MOST_AXES = 4
ALIGNMENT = 32
# Blocks in a row of what is dequantised at once.
BLOCKS = 512
# Tensors that are stored as values; all others are blocks, dequantised.
VALUES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
}


def library() -> Any:
  """The `gguf` package.

  Raises:
    ImportError: it is not installed; says how to.
  """
  try:
    return importlib.import_module("gguf")
  except ImportError as error:
    raise ImportError(
      "GGUF files need the package gguf: pip install 'tokjax[gguf]'"
    ) from error


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor lies.

  Attributes:
    shape: rows first; the file states it in the other order.
    kind: of its values or blocks, `gguf.GGMLQuantizationType`.
    first, size: bytes, from the start of the file.
  """

  shape: tuple[int, ...]
  kind: Any
  first: int
  size: int


class _Cursor:
  """Reads values one after another; never beyond the end of the file."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def room(self, count: int, size: int, what: str) -> None:
    """Raises if `count` entries of `size` bytes are more than what is left."""
    left = len(self.data) - self.at
    if count * size > left:
      raise ValueError(
        f"{what} needs {count * size} bytes at byte {self.at}, where {left} are"
        " left"
      )

  def one(self, code: str, what: str) -> Any:
    """A value of a `struct` code."""
    size = struct.calcsize("<" + code)
    self.room(1, size, what)
    value = struct.unpack_from("<" + code, self.data, self.at)[0]
    self.at += size
    return value

  def text(self, what: str) -> str:
    """A string with its length in front."""
    size = self.one("Q", f"the length of {what}")
    self.room(size, 1, what)
    start, self.at = self.at, self.at + size
    try:
      return self.data[start : self.at].decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"{what} is not UTF-8 ({error.reason})") from error

  def texts(self, count: int, what: str) -> list[str]:
    """Strings one after another; a vocabulary has 100,000 of them."""
    data, end, found = self.data, len(self.data), []
    length = struct.Struct("<Q").unpack_from
    for _ in range(count):
      start = self.at + 8
      stop = start + length(data, self.at)[0] if start <= end else end + 1
      if stop > end:
        return [*found, self.text(what)]  # Raises, and says what is missing.
      found.append(data[start:stop])
      self.at = stop
    try:
      return [text.decode() for text in found]
    except UnicodeDecodeError as error:
      raise ValueError(f"{what} is not UTF-8 ({error.reason})") from error

  def value(self, name: str) -> Any:
    """A metadata value, with its type in front."""
    kind = self.one("I", f"the type of {name}")
    if kind == ARRAY:
      return self.array(name)
    return self.scalar(kind, name)

  def scalar(self, kind: int, name: str) -> Any:
    if kind == STRING:
      return self.text(name)
    if kind not in SCALARS:
      raise ValueError(f"{name} has type {kind}, which GGUF does not have")
    value = self.one(SCALARS[kind], name)
    # 1e-5 is stored as 9.99999974e-06: the shortest number that means the same.
    return float(str(np.float32(value))) if kind == FLOAT32 else value

  def array(self, name: str) -> list[str] | np.ndarray:
    kind = self.one("I", f"the type of {name}")
    count = self.one("Q", f"the length of {name}")
    if kind == STRING:
      self.room(count, 8, name)
      return self.texts(count, name)
    if kind not in SCALARS:
      raise ValueError(
        f"{name} is a list of type {kind}; lists of numbers and of strings are"
        " read"
      )
    dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
    self.room(count, dtype.itemsize, name)
    values = np.frombuffer(self.data, dtype, count, self.at)
    self.at += count * dtype.itemsize
    return values


class GgufFile:
  """A GGUF file that was checked: every tensor lies inside it.

  Attributes:
    path: of the file.
    metadata: values by key; FLOAT32 as the shortest decimal, lists of numbers
      as arrays.
    headers: shape of every tensor, and the dtype that `read` gives.
  """

  def __init__(self, path: pathlib.Path):
    """Reads the header.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: no GGUF file, one that ends too early or is damaged.
      ImportError: the package `gguf` is not installed.
    """
    # The user names the file itself, so a link may lead anywhere.
    self.path = files.regular(path.expanduser().resolve())
    self.metadata: dict[str, Any] = {}
    self._places: dict[str, Place] = {}
    library()
    try:
      self._data = mapped(self.path)
      self._read_header()
    except (ValueError, OverflowError) as error:
      raise CheckpointError(
        f"{self.path}: {self.path.stat().st_size} bytes, truncated, damaged or"
        f" no GGUF file ({error}); download or write this file again"
      ) from error
    self.headers = {
      name: Header(place.shape, dtype_of(place.kind))
      for name, place in self._places.items()
    }

  def _read_header(self) -> None:
    cursor = _Cursor(self._data)
    if self._data[:4] != MAGIC:
      raise ValueError(f"it begins with {self._data[:4]!r}, not {MAGIC!r}")
    cursor.at = 4
    version = cursor.one("I", "the version")
    if version not in VERSIONS:
      hint = ", or big-endian" if version and version % 65536 == 0 else ""
      raise ValueError(f"version {version}{hint}; {VERSIONS} are read")
    tensors = cursor.one("Q", "the number of tensors")
    values = cursor.one("Q", "the number of metadata values")
    cursor.room(values, LEAST_VALUE, f"metadata of {values} values")
    for _ in range(values):
      name = cursor.text("a key")
      if name in self.metadata:
        raise ValueError(f"{name} is there twice")
      self.metadata[name] = cursor.value(name)
    cursor.room(tensors, LEAST_TENSOR, f"a list of {tensors} tensors")
    stated = [self._tensor(cursor) for _ in range(tensors)]
    first = -(-cursor.at // self._alignment()) * self._alignment()
    for name, shape, kind, offset in stated:
      self._place(name, shape, kind, first + offset)

  def _alignment(self) -> int:
    value = self.metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(value, int) or value < 1 or value & (value - 1):
      raise ValueError(f"general.alignment={value!r}: must be a power of two")
    return value

  def _tensor(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], Any, int]:
    name = cursor.text("the name of a tensor")
    axes = cursor.one("I", f"axes of {name}")
    if not 1 <= axes <= MOST_AXES:
      raise ValueError(f"{name} has {axes} axes; 1 to {MOST_AXES} are allowed")
    shape = [cursor.one("Q", f"axes of {name}") for _ in range(axes)]
    code = cursor.one("I", f"the type of {name}")
    try:
      kind = library().GGMLQuantizationType(code)
    except ValueError as error:
      raise ValueError(
        f"{name} has type {code}, which this version of the gguf package does"
        " not know"
      ) from error
    offset = cursor.one("Q", f"the place of {name}")
    return name, tuple(reversed(shape)), kind, offset

  def _place(self, name: str, shape, kind, first: int) -> None:
    if name in self._places:
      raise ValueError(f"tensor {name} is there twice")
    block, bytes_ = library().GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
      raise ValueError(
        f"{name} {list(shape)}: rows of {kind.name} have a multiple of {block}"
        " values"
      )
    size = math.prod(shape) // block * bytes_
    if first + size > len(self._data):
      raise ValueError(
        f"{name} {list(shape)} of {kind.name} ends at byte {first + size}"
      )
    self._places[name] = Place(shape, kind, first, size)

  def read(self, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named tensors; blocks are dequantised to float32."""
    places = [self._places[name] for name in names]
    library()  # Imported by one thread, before all of them need it.
    # NumPy lets other threads run while it computes.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      return dict(zip(names, pool.map(self._tensor_of, places), strict=True))

  def _tensor_of(self, place: Place) -> np.ndarray:
    if not place.size:
      return np.zeros(place.shape, np.float32)
    raw = np.frombuffer(self._data, np.uint8, place.size, place.first)
    if place.kind.name in VALUES:
      return raw.view(VALUES[place.kind.name]).reshape(place.shape)
    # Blocks know nothing of rows, and the package takes sixteen rows at a time:
    # long ones save it most of its steps.
    size = library().GGML_QUANT_SIZES[place.kind][1]
    rows = raw.reshape(-1, math.gcd(len(raw) // size, BLOCKS) * size)
    return library().dequantize(rows, place.kind).reshape(place.shape)


def mapped(path: pathlib.Path) -> mmap.mmap:
  """The bytes of a file, read on demand."""
  with path.open("rb") as file:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def dtype_of(kind: Any) -> str:
  """The dtype that a tensor is read as; its type's name if it cannot be."""
  if kind.name in VALUES:
    return np.dtype(VALUES[kind.name]).name
  return "float32" if is_dequantised(kind) else kind.name


@functools.cache
def is_dequantised(kind: Any) -> bool:
  """True if the package can turn blocks of a type into values."""
  block = np.zeros((1, library().GGML_QUANT_SIZES[kind][1]), np.uint8)
  try:
    with np.errstate(all="ignore"):
      library().dequantize(block, kind)
  except NotImplementedError:
    return False
  return True
