"""Builders of tensorflow-datasets by index, without TensorFlow.

Prepare a builder once, which may need TensorFlow; reading does not:

python -m experiments.data.tfds_source --builder cifar10 --data_dir DIR
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from experiments.data.errors import DataError
from experiments.typed import did_you_mean


@dataclasses.dataclass(frozen=True)
class Renamed:
  """A random-access source of dicts, some of whose keys are kept, renamed.

  Attributes:
    source: what is read.
    keys: (new name, name in the source).
    limit: at most so many examples.
  """

  source: Any
  keys: tuple[tuple[str, str], ...]
  limit: int | None = None

  def __len__(self) -> int:
    count = len(self.source)
    return count if self.limit is None else min(count, self.limit)

  def __getitem__(self, index: int) -> dict[str, Any]:
    element = self.source[index]
    return {new: element[old] for new, old in self.keys}


def load(
  name: str,
  split: str,
  data_dir: str | None,
  keys: tuple[tuple[str, str], ...],
  limit: int | None = None,
) -> Sequence[dict[str, Any]]:
  """A split of a prepared builder.

  Args:
    keys: (our name, the builder's feature).

  Raises:
    DataError: unknown builder, split or feature, or not prepared; the message
      has the command that prepares it.
  """
  source = _open(name, split, data_dir)
  builder = _builder(name, data_dir)
  features = list(builder.info.features)
  for _, feature in keys:
    if feature not in features:
      raise DataError(
        f"builder {name!r} has no feature {feature!r}; it has {features}"
      )
  return Renamed(source, keys, limit)


@functools.cache
def _builder(name: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(name, data_dir=data_dir, file_format="array_record")
  except tfds.core.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    raise DataError(
      f"builder={name!r}: not found in tensorflow-datasets"
      f"{did_you_mean(name, known)}"
    ) from error


def _open(name: str, split: str, data_dir: str | None) -> Any:
  builder = _builder(name, data_dir)
  try:
    return builder.as_data_source(split=split)
  except (
    AssertionError,
    KeyError,
    NotImplementedError,
    OSError,
    ValueError,
  ) as e:
    if splits := list(builder.info.splits):
      raise DataError(
        f"builder {name!r}: split {split!r} cannot be read; it has {splits}"
        f" ({e})"
      ) from e
    where = f" --data_dir {data_dir}" if data_dir else ""
    raise DataError(
      f"builder {name!r} is not prepared under {builder.data_dir}. Prepare it"
      f" once with\n  python -m experiments.data.tfds_source --builder {name}"
      f"{where}\n(this downloads; builders with images need `pip install"
      " tensorflow-cpu` for it, training does not)"
    ) from e


def prepare(name: str, data_dir: str | None) -> str:
  """Downloads and prepares a builder; returns where."""
  builder = _builder(name, data_dir)
  builder.download_and_prepare(file_format="array_record")
  return str(builder.data_dir)


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      prepare.__doc__ or "",
      (
        Option("builder", str, None, "Of tensorflow-datasets.", required=True),
        Option("data_dir", str, None, "Folder; None: the library's own."),
        Option("traceback", bool, False, "Show where an error comes from."),
      ),
    ),
    lambda given: print(prepare(given.builder, given.data_dir)),
  )
