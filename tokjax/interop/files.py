"""Folders with config.json and safetensors, on disk or from a hub.

Weights are read from safetensors only; nothing is ever unpickled.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import reprlib
import stat
from collections.abc import Generator, Mapping
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub import errors
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokjax.interop.tensors import CheckpointError, Header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF, ONNX = ".gguf", ".onnx"
SHARDS = "model-*-of-*.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".h5", ".msgpack")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# A name in this folder: no separator, and no dot in front.
PLAIN = re.compile(r"[^/\\:\0.][^/\\:\0]*\.safetensors")
# Of each of two tensors that are compared.
EQUAL_BYTES = 2**26
DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
}


def locate(source: str | pathlib.Path, revision: str | None = None):
  """The folder of a checkpoint; a hub id is downloaded (or found in cache).

  Args:
    source: a folder, a GGUF or ONNX file, or a hub id such as
      "facebook/deit-small-patch16-224".
    revision: branch, tag or commit on the hub.

  Raises:
    FileNotFoundError: neither a folder nor a hub id that can be reached.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir() or (folder.exists() and folder.suffix in (GGUF, ONNX)):
    return folder
  if folder.exists():
    raise FileNotFoundError(
      f"{source!s} is a file; give the folder with config.json and {SINGLE},"
      f" or a file that ends in {GGUF} or {ONNX}"
    )
  if not HUB_ID.fullmatch(str(source)):
    raise FileNotFoundError(
      f"{source!s} is neither a folder nor a hub id (owner/name), nor a file"
      f" that ends in {GGUF} or {ONNX}"
    )
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        str(source),
        revision=revision,
        allow_patterns=["*.safetensors", "*.json"],
      )
    )
  except (errors.OfflineModeIsEnabled, OSError, ValueError) as error:
    raise FileNotFoundError(
      f"{source!s} is no folder here, and the hub did not give it"
      f" ({type(error).__name__}: {error}). Without a network, download it"
      " elsewhere and pass the folder, or set HF_HOME to a cache that holds it"
    ) from error


def regular(path: pathlib.Path) -> pathlib.Path:
  """A file that may be opened: a regular one, inside its folder.

  Links are followed as a hub cache has them: from `snapshots/COMMIT` to
  `blobs` of the same model.

  Raises:
    FileNotFoundError: there is no such file.
    CheckpointError: a pipe, device or folder, which would block or never end;
      or a link that leads out of the checkpoint.
  """
  try:
    mode = path.stat().st_mode
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{path.parent}: has no {path.name}") from error
  if not stat.S_ISREG(mode):
    raise CheckpointError(f"{path}: is no regular file, and is not opened")
  folder, real = path.parent.resolve(), path.resolve()
  roots = [folder]
  if folder.parent.name == "snapshots":
    roots.append(folder.parent.parent / "blobs")
  if not any(real.is_relative_to(root) for root in roots):
    raise CheckpointError(
      f"{path}: is a link to {real}, outside of the checkpoint, and is not"
      " opened; put the file itself there"
    )
  return path


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: not JSON, not an object, or nested beyond Python's limit.
  """
  try:
    value = json.loads(regular(path).read_text(encoding="utf-8"))
  except RecursionError as error:
    raise ValueError(f"{path}: is nested too deeply") from error
  except CheckpointError:
    raise
  except ValueError as error:
    # Not JSON, not UTF-8, or a number of thousands of digits.
    raise ValueError(f"{path}: is not JSON ({error})") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path}: must be a JSON object")
  return value


def read_text(path: pathlib.Path) -> str:
  """A text of a checkpoint.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not UTF-8.
  """
  try:
    return regular(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: is not UTF-8 ({error.reason})") from error


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Generator[pathlib.Path]:
  """A path to write to, which becomes `path` once all is written.

  Whoever reads `path` meanwhile finds the old file or none, never a part.
  """
  part = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield part
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object with sorted keys."""
  with appearing(path) as part:
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one file of tensors."""
  with appearing(path) as part:
    # As any new file here: safetensors makes files that only their owner reads.
    part.touch()
    mode = part.stat().st_mode
    # `transformers` and timm refuse files that do not name their framework.
    save_file(dict(tensors), part, metadata={"format": "pt"})
    part.chmod(mode)


class TensorFiles:
  """The safetensors of a folder, one file or shards with an index.

  Attributes:
    headers: shape and dtype of every tensor.
  """

  def __init__(self, folder: pathlib.Path):
    self.headers: dict[str, Header] = {}
    self._file: dict[str, pathlib.Path] = {}
    twice = []
    for path in tensor_files(folder):
      with opened(path) as file:
        for name in file.keys():
          if name in self._file:
            twice.append(f"{name} ({self._file[name].name}, {path.name})")
          part = file.get_slice(name)
          dtype = part.get_dtype()
          self.headers[name] = Header(
            tuple(part.get_shape()), DTYPES.get(dtype, dtype)
          )
          self._file[name] = path
    if twice:
      raise CheckpointError(
        f"{folder}: tensors are in two files: {', '.join(twice)}"
      )

  def read(self, names: list[str]) -> dict[str, np.ndarray]:
    """The named tensors."""
    found = {}
    for path in sorted({self._file[name] for name in names}):
      with opened(path) as file:
        for name in names:
          if self._file[name] == path:
            found[name] = file.get_tensor(name)
    return found

  def equal(self, a: str, b: str) -> bool:
    """True if two tensors have the same values; reads rows at a time."""
    shape = self.headers[a].shape
    if shape != self.headers[b].shape or not shape:
      return False
    rows = max(1, EQUAL_BYTES // (4 * max(1, math.prod(shape[1:]))))
    with opened(self._file[a]) as one, opened(self._file[b]) as other:
      one, other = one.get_slice(a), other.get_slice(b)
      # safetensors refuses slices that end beyond an axis.
      parts = [
        slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)
      ]
      return all(np.array_equal(one[part], other[part]) for part in parts)


def opened(path: pathlib.Path):
  """A file of tensors, open for reading.

  Raises:
    CheckpointError: it ends before its tensors do, or is none.
  """
  try:
    return safe_open(regular(path), "np")
  except SafetensorError as error:
    raise CheckpointError(
      f"{path}: {path.stat().st_size} bytes, truncated or damaged ({error});"
      " download or write this file again"
    ) from error


def tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors of a folder, in the order of their names."""
  if (folder / INDEX).exists():
    paths = [folder / name for name in sorted(shards_of(folder / INDEX))]
    if absent := [path.name for path in paths if not path.exists()]:
      raise FileNotFoundError(
        f"{folder}: {INDEX} names files that are not there: {absent}"
      )
    return paths
  if (folder / SINGLE).exists():
    return [folder / SINGLE]
  other = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
  hint = f"; it has {other}, which are not read" if other else ""
  raise FileNotFoundError(
    f"{folder}: has neither {SINGLE} nor {INDEX}{hint}. Weights are read from"
    " safetensors only, because unpickling a file runs code in it"
  )


def shards_of(index: pathlib.Path) -> set[str]:
  """Names of the files in an index.

  Raises:
    CheckpointError: it has no map of names to names, or a name is a path.
  """
  found = read_json(index).get("weight_map")
  if not isinstance(found, dict) or not found:
    raise CheckpointError(
      f"{index}: weight_map={reprlib.repr(found)}: must be an object of tensors"
      " and the files that they are in"
    )
  wrong = [
    f"{name}: {reprlib.repr(file)}"
    for name, file in found.items()
    if not isinstance(file, str) or not PLAIN.fullmatch(file)
  ]
  if wrong:
    more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    raise CheckpointError(
      f"{index}: {len(wrong)} entries of weight_map do not name a file of this"
      " folder that ends in .safetensors\n  " + "\n  ".join(wrong[:20]) + more
    )
  return set(found.values())


def write_tensors(
  folder: pathlib.Path, tensors: Mapping[str, np.ndarray], shard_bytes: int
) -> None:
  """Writes model.safetensors, or shards with an index beyond `shard_bytes`."""
  shards, size = [{}], 0
  for name, value in tensors.items():
    if shards[-1] and size + value.nbytes > shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = value
    size += value.nbytes
  names, many = [SINGLE], len(shards)
  if many > 1:
    numbers = range(1, many + 1)
    names = [f"model-{i:05d}-of-{many:05d}.safetensors" for i in numbers]
  for name, shard in zip(names, shards, strict=True):
    write_file(folder / name, shard)
  if many > 1:
    weight_map = {
      tensor: name
      for name, shard in zip(names, shards, strict=True)
      for tensor in shard
    }
    total = sum(value.nbytes for value in tensors.values())
    write_json(
      folder / INDEX,
      {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    names.append(INDEX)
  # The files of an earlier model; readers look for the index first.
  for old in (INDEX, SINGLE, *(p.name for p in folder.glob(SHARDS))):
    if old not in names:
      (folder / old).unlink(missing_ok=True)
