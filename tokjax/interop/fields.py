"""Values of published JSON files: checked by kind, and reported together.

A reader takes `(part, name)`, a JSON object and a key, and returns the value
as ours. What it refuses it says with the key, the value and what is allowed;
`Problems` collects that over a file and raises one error.
"""

import contextlib
import dataclasses
import math
import reprlib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

Json = Mapping[str, Any]
Reader = Callable[[Json, str], Any]
# Far above every published depth.
MOST_BLOCKS = 10_000


class ConfigError(ValueError):
  """A published JSON file that cannot be followed; lists every reason.

  Attributes:
    found: the reasons, without the name of the file.
  """

  def __init__(self, source: str, found: Iterable[str]):
    self.found = tuple(found)
    many = f"{len(self.found)} faults\n  " if len(self.found) > 1 else ""
    super().__init__(f"{source}: {many}" + "\n  ".join(self.found))


class Problems:
  """Faults of one file, collected while it is read.

  Attributes:
    source: the file's name, for the message.
    found: the faults so far.
  """

  def __init__(self, source: str):
    self.source, self.found = source, []

  @contextlib.contextmanager
  def collect(self) -> Generator[None]:
    """Keeps a fault that is raised inside, and goes on after the block."""
    try:
      yield
    except ConfigError as error:
      self.found += error.found
    except ValueError as error:
      self.found.append(str(error))

  def check(self) -> None:
    """Raises ConfigError if there were faults."""
    if self.found:
      raise ConfigError(self.source, self.found)


  def build(self, make: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """An object of these values.

    Raises:
      ConfigError: there were faults, or `make` finds some.
    """
    self.check()
    with self.collect():
      return make(**values)
    raise ConfigError(self.source, self.found)


@contextlib.contextmanager
def problems_of(source: str) -> Generator[None]:
  """A fault inside becomes a ConfigError of this file."""
  problems = Problems(source)
  with problems.collect():
    yield
  problems.check()


@dataclasses.dataclass(frozen=True)
class Field:
  """One value of a config.json, read and written by the same entry.

  Attributes:
    ours, theirs: its names.
    read: `(part, their name) -> our value`.
    write: `(our value, the whole configuration) -> their value`; None: it is
      not written, because the keys of other fields say it.
    more: `our value -> further keys`, where one key does not hold it.
  """

  ours: str
  theirs: str
  read: Reader
  write: Callable[[Any, Any], Any] | None = lambda value, config: value
  more: Callable[[Any], Json] = lambda value: {}

  def written(self, config: Any) -> dict[str, Any]:
    """The keys of config.json for this field of a configuration."""
    value, found = getattr(config, self.ours), {}
    if self.write is not None:
      found[self.theirs] = self.write(value, config)
    return {**found, **self.more(value)}


def named(ours: str, theirs: str, names: Mapping[str, Any]) -> Field:
  """A field whose values have other names in config.json.

  Args:
    ours, theirs: names of the field.
    names: their names of our values; the first of several is written.
  """
  back = {value: name for name, value in reversed(names.items())}
  return Field(ours, theirs, one_of(names), lambda value, config: back[value])


def read_fields(
  fields: Iterable[Field], part: Json, problems: Problems
) -> dict[str, Any]:
  """Our values of those fields that can be read; the rest are problems."""
  values = {}
  for field in fields:
    with problems.collect():
      values[field.ours] = field.read(part, field.theirs)
  return values


def wrong(name: str, value: Any, allowed: str) -> ValueError:
  """The error for a value that is not allowed."""
  return ValueError(f"{name}={reprlib.repr(value)}: must be {allowed}")


def get(part: Json, name: str) -> Any:
  """A value that must be there, of any kind."""
  if name not in part:
    raise ValueError(f"has no {name!r}")
  return part[name]


def is_integer(value: Any) -> bool:
  """An integer of 32 bits; JSON's `true` is a Python integer, but no number."""
  whole = isinstance(value, int) and not isinstance(value, bool)
  return whole and abs(value) < 2**31


def is_number(value: Any) -> bool:
  """A finite number; Python reads `NaN`, `Infinity` and `1e999` as well."""
  if isinstance(value, float):
    return math.isfinite(value)
  return is_integer(value)


def integer(part: Json, name: str) -> int:
  """An integer of 1 or more."""
  value = get(part, name)
  if not is_integer(value) or value < 1:
    raise wrong(name, value, "an integer of 1 or more, below 2^31")
  return value


def depth(part: Json, name: str) -> int:
  """A number of blocks, small enough to list them."""
  value = integer(part, name)
  if value > MOST_BLOCKS:
    raise wrong(name, value, f"{MOST_BLOCKS} or less")
  return value


def natural(part: Json, name: str) -> int:
  """An integer of 0 or more."""
  value = get(part, name)
  if not is_integer(value) or value < 0:
    raise wrong(name, value, "an integer of 0 or more, below 2^31")
  return value


def number(part: Json, name: str) -> float:
  """A finite number."""
  value = get(part, name)
  if not is_number(value):
    raise wrong(name, value, "a finite number")
  return float(value)


def positive(part: Json, name: str) -> float:
  """A finite number above 0."""
  value = get(part, name)
  if not is_number(value) or value <= 0:
    raise wrong(name, value, "a finite number above 0")
  return float(value)


def flag(part: Json, name: str) -> bool:
  """True or false."""
  value = get(part, name)
  if not isinstance(value, bool):
    raise wrong(name, value, "true or false")
  return value


def optional(read: Reader, default: Any = None) -> Reader:
  """A reader for which absent and null mean `default`."""

  def reader(part: Json, name: str) -> Any:
    return default if part.get(name) is None else read(part, name)

  return reader


def one_of(names: Mapping[str, Any]) -> Reader:
  """A reader of a name; returns what it means here."""

  def reader(part: Json, name: str) -> Any:
    value = get(part, name)
    if not isinstance(value, str) or value not in names:
      raise wrong(name, value, f"one of {sorted(names)}")
    return names[value]

  return reader


def per_channel(
  name: str, found: tuple[float, ...], channels: int, positive: bool
) -> tuple[float, ...]:
  """Numbers, one for each channel."""
  if len(found) != channels:
    raise wrong(name, found, f"of {channels} channels")
  if positive and min(found) <= 0:
    raise wrong(name, found, "above 0 in every channel")
  return found


def string(part: Json, name: str) -> str:
  """A string."""
  value = get(part, name)
  if not isinstance(value, str):
    raise wrong(name, value, "a string")
  return value


def numbers(part: Json, name: str) -> tuple[float, ...]:
  """A list of finite numbers."""
  value = get(part, name)
  if not isinstance(value, list | tuple) or not all(map(is_number, value)):
    raise wrong(name, value, "a list of finite numbers")
  return tuple(float(x) for x in value)


def strings(part: Json, name: str) -> tuple[str, ...]:
  """A list of strings."""
  value = get(part, name)
  if not isinstance(value, list | tuple) or not all(
    isinstance(x, str) for x in value
  ):
    raise wrong(name, value, "a list of strings")
  return tuple(value)


def mapping(part: Json, name: str) -> Json:
  """A JSON object; absent or null: an empty one."""
  value = part.get(name)
  if value is None:
    return {}
  if not isinstance(value, Mapping):
    raise wrong(name, value, "a JSON object")
  return value


def size(part: Json, name: str) -> int | tuple[int, int]:
  """One side for both, or height and width; equal ones are one number."""
  value = get(part, name)
  sides = value if isinstance(value, list | tuple) else (value, value)
  if len(sides) != 2 or not all(is_integer(x) and x > 0 for x in sides):
    raise wrong(name, value, "an integer of 1 or more, or [height, width]")
  return sides[0] if sides[0] == sides[1] else tuple(sides)


def input_size(part: Json, name: str) -> tuple[int, int, int]:
  """Channels, height and width, as timm gives them."""
  value = get(part, name)
  if (
    not isinstance(value, list | tuple)
    or len(value) != 3
    or not all(is_integer(x) and x > 0 for x in value)
  ):
    raise wrong(name, value, "[channels, height, width]")
  return value[0], value[1], value[2]


def square(part: Json, name: str) -> int:
  """A side, given once or as two equal ones."""
  sides = size(part, name)
  if not isinstance(sides, int):
    raise wrong(name, part[name], "square")
  return sides


def refuse(part: Json, names: Iterable[str], problems: Problems) -> None:
  """Adds a problem for each key that is there and neither null nor false."""
  problems.found += [
    f"{name}={reprlib.repr(part[name])} is not supported"
    for name in names
    if part.get(name) not in (None, False)
  ]


# Packed weights; their tensors have other names, shapes and types.
QUANTISED = ("quantization_config", "compression_config")


@dataclasses.dataclass(frozen=True)
class Family:
  """How the classes of one `model_type` write their config.json.

  Attributes:
    model_type: as `transformers` calls it.
    fields: the values, for both directions.
    defaults: those that config.json may leave out.
    implied: our values that follow from the family.
    refused: keys of config.json that must be absent, null or false.
  """

  model_type: str
  fields: tuple[Field, ...]
  defaults: Json
  implied: Json
  refused: tuple[str, ...] = ()

  def read(self, part: Json, problems: Problems) -> dict[str, Any]:
    """Our values of a config.json (or of a tower's part of one).

    What cannot be read is added to `problems` and is not among the values.
    """
    part = {**self.defaults, **part}
    refuse(part, (*QUANTISED, *self.refused), problems)
    return {**self.implied, **read_fields(self.fields, part, problems)}

  def write(self, config: Any) -> dict[str, Any]:
    """The keys of config.json for a configuration."""
    whole: dict[str, Any] = {"model_type": self.model_type}
    for field in self.fields:
      whole |= field.written(config)
    return whole

  def their_name(self, ours: str) -> str:
    """What config.json calls one of our fields; ours if it states none."""
    return next((f.theirs for f in self.fields if f.ours == ours), ours)
