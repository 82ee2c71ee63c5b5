"""What `load` and `save` ask of a published layout of checkpoints."""

import abc
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from tokjax.interop import convert, fields
from tokjax.interop.files import TensorFiles
from tokjax.interop.tables import Row
from tokjax.slots import Slots


def prefix_of(
  names: Collection[str], prefixes: Sequence[str], begin: str
) -> str:
  """The prefix with which a tensor `begin...` is named, else the usual one.

  Args:
    names: of the tensors in a file.
    prefixes: that classes of models write, the usual one first.
    begin: how the name of some tensor begins behind the prefix.
  """
  for prefix in prefixes:
    if any(name.startswith(f"{prefix}{begin}") for name in names):
      return prefix
  return prefixes[0]


class Layout(abc.ABC):
  """One class of models of one library.

  Attributes:
    name: of the class, or of the library if it has one layout.
    written: models can be exported to it.
    holds: the class of its configurations.
  """

  name: str
  written: bool = False
  holds: ClassVar[type]

  @abc.abstractmethod
  def prefix(self, names: Collection[str]) -> str:
    """The prefix of the model's tensors in a file with these names."""

  @abc.abstractmethod
  def table(self, config: Any) -> tuple[Row, ...]:
    """The rows that a file of this layout may have."""

  @abc.abstractmethod
  def read(self, whole: fields.Json, names: Collection[str]) -> Any:
    """The configuration in a config.json.

    Args:
      whole: config.json.
      names: of the tensors, for what only they show.

    Raises:
      ConfigError: lists every value that is absent, of another type or not
        supported.
    """

  @abc.abstractmethod
  def build(self, config: Any, slots: Slots, dtype: Any) -> Any:
    """The model."""

  @abc.abstractmethod
  def input_of(self, folder: pathlib.Path, config: Any) -> Any:
    """What makes the model's inputs; None if the folder does not state it."""

  def entries(
    self, config: Any, names: Collection[str]
  ) -> list[convert.Entry]:
    """All that a file with these names holds of a configuration's parameters.

    Raises:
      CheckpointError: the layout has no place for some of them.
    """
    rows = self.table(config)
    return convert.entries(rows, config, self.prefix(names))

  def settle(self, config: Any, tensors: TensorFiles) -> Any:
    """The configuration, where values of tensors decide something in it."""
    del tensors
    return config

  def is_ignored(self, name: str, config: Any) -> bool:
    """True for tensors that belong to other parts than the model."""
    del name, config
    return False

  def their_name(self, ours: str) -> str:
    """What config.json calls a field of the configuration."""
    return ours

  def stated_as(self, ours: str) -> str:
    """Where a field of the configuration stands, for messages."""
    return f"config.json: {self.their_name(ours)}"

  def resolved(self, config: Any) -> Any:
    """The configuration with every default that follows from others filled in.

    Two configurations of the same model resolve to equal ones.
    """
    return config

  def write(self, config: Any) -> dict[str, Any]:
    """The config.json of a configuration."""
    raise NotImplementedError(f"{self.name}: {config} cannot be written")
