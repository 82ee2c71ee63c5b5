"""From an `ml_collections` config to frozen typed dataclasses, once.

Nothing below `main` sees a ConfigDict. Every key is checked against the
fields of the dataclass it fills; a field that may hold one of several
dataclasses (a task, a data set, a model) is a table of names, and the config
chooses with `name`.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
  """A config that does not fit; the message names the key."""


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Annotation of a field: one of several dataclasses, chosen by `name`."""

  table: Mapping[str, type]


def build(cls: type, config: Mapping[str, Any], where: str = "config") -> Any:
  """Fills the dataclass `cls` from a mapping.

  Args:
    cls: a dataclass; its annotations are the types that are allowed.
    config: keys and values; a nested mapping fills a nested dataclass.
    where: how the mapping is called in messages.

  Raises:
    ConfigError: an unknown key, a missing one or a value of a wrong type.
  """
  if not isinstance(config, Mapping):
    raise ConfigError(
      f"{where}={config!r}: must be a mapping for {cls.__name__}"
    )
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  unknown = [key for key in config if key not in fields]
  if unknown:
    raise ConfigError(_unknown(where, unknown[0], fields))
  values = {}
  for key, value in config.items():
    values[key] = convert(hints[key], value, f"{where}.{key}")
  missing = [
    name
    for name, f in fields.items()
    if name not in values
    and f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ConfigError(f"{where}.{missing[0]}: {cls.__name__} needs it")
  try:
    return cls(**values)
  except (ArithmeticError, TypeError, ValueError) as error:
    raise ConfigError(f"{where}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
  """`value` as the annotation `hint` wants it, or a ConfigError."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated and isinstance(args[1], OneOf):
    return _choose(args[1].table, value, where)
  if origin is typing.Annotated:
    return convert(args[0], value, where)
  if hint is Any:
    return value
  if origin in (types.UnionType, typing.Union):
    return _union(args, value, where)
  if origin is typing.Literal:
    if value not in args:
      raise ConfigError(
        f"{where}={value!r}: must be one of {args}{did_you_mean(value, args)}"
      )
    return value
  if origin is tuple or hint is tuple:
    return _tuple(args, value, where)
  if origin in (dict, Mapping):
    if not isinstance(value, Mapping | tuple | list):
      raise ConfigError(f"{where}={value!r}: must be a mapping")
    return tuple(sorted(dict(value).items()))
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else build(hint, value, where)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint is float and isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{where}={value!r}: must be a finite number")
  if hint is int and isinstance(value, bool) or not isinstance(value, hint):
    raise ConfigError(
      f"{where}={value!r}: must be {hint.__name__}, not {type(value).__name__}"
    )
  return value


def _tuple(args, value, where: str) -> tuple:
  """Elements of one type, or of any if there are no `args`."""
  if not isinstance(value, tuple | list):
    raise ConfigError(f"{where}={value!r}: must be a tuple")
  if len(args) > 1 and args[-1] is not Ellipsis and len(args) != len(value):
    raise ConfigError(f"{where}={value!r}: must have {len(args)} elements")
  kind = args[0] if args else Any
  return tuple(convert(kind, v, f"{where}[{i}]") for i, v in enumerate(value))


def _union(args, value, where: str) -> Any:
  if value is None and type(None) in args:
    return None
  errors = []
  for arg in args:
    if arg is type(None):
      continue
    try:
      return convert(arg, value, where)
    except ConfigError as error:
      errors.append(str(error))
  raise ConfigError("; or ".join(errors))


def _choose(table: Mapping[str, type], value: Any, where: str) -> Any:
  if isinstance(value, tuple(table.values())):
    return value
  if not isinstance(value, Mapping):
    raise ConfigError(f"{where}={value!r}: must be a mapping with a name")
  options = dict(value)
  return build(chosen(table, options.pop("name", None), where), options, where)


def chosen(table: Mapping[str, type], name: Any, where: str) -> type:
  """The dataclass of that name, or a ConfigError."""
  if not isinstance(name, str) or name not in table:
    raise ConfigError(
      f"{where}.name={name!r}: must be one of {sorted(table)}"
      f"{did_you_mean(name, table)}"
    )
  return table[name]


def _unknown(where: str, key: str, fields) -> str:
  hint = did_you_mean(key, fields) or "."
  return f"{where}.{key}: unknown key{hint} Known are: {', '.join(fields)}"


def did_you_mean(word: Any, known: Iterable[Any]) -> str:
  """`; did you mean 'lr'?`, or nothing where no known word is near."""
  near = difflib.get_close_matches(str(word), map(str, known), n=1)
  return f"; did you mean {near[0]!r}?" if near else ""


def field_type(cls: type, name: str, where: str) -> Any:
  """Annotation of a field of `cls`, or a ConfigError."""
  fields = [f.name for f in dataclasses.fields(cls) if f.init]
  if name not in fields:
    raise ConfigError(_unknown(where, name, fields))
  return typing.get_type_hints(cls, include_extras=True)[name]


def parts(hint: Any) -> tuple[Mapping[str, type] | None, type | None]:
  """What is inside of a field: a table of dataclasses, or one, or `dict`.

  `(None, None)` for a field without entries of its own.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated:
    if isinstance(args[1], OneOf):
      return args[1].table, None
    return parts(args[0])
  if origin in (types.UnionType, typing.Union):
    return next(filter(any, map(parts, args)), (None, None))
  if hint is dict or origin in (dict, Mapping):
    return None, dict
  return None, hint if dataclasses.is_dataclass(hint) else None


def optional(hint: Any) -> bool:
  """Whether a field may be None."""
  return type(None) in typing.get_args(hint)


def to_dict(value: Any, table: Mapping[str, type] | None = None) -> Any:
  """The inverse of `build`: plain values, every default written out."""
  if not dataclasses.is_dataclass(value):
    return list(value) if isinstance(value, tuple) else value
  hints = typing.get_type_hints(type(value), include_extras=True)
  out = {}
  if table is not None:
    out["name"] = next(k for k, cls in table.items() if cls is type(value))
  for f in dataclasses.fields(value):
    if not f.init:
      continue
    hint, item = hints[f.name], getattr(value, f.name)
    if typing.get_origin(hint) in (dict, Mapping):
      out[f.name] = dict(item)
    else:
      out[f.name] = _plain(hint, item)
  return out


def _plain(hint: Any, item: Any) -> Any:
  args = typing.get_args(hint)
  if len(args) > 1 and isinstance(args[1], OneOf):
    return to_dict(item, args[1].table)
  if isinstance(item, tuple) and args:
    return [_plain(args[0], value) for value in item]
  return to_dict(item)


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
  """`{"optimizer": {"lr": 1}}` to `{"optimizer.lr": 1}`."""
  out = {}
  for key, value in values.items():
    path = f"{where}.{key}" if where else key
    if isinstance(value, Mapping) and value:
      out.update(flatten(value, path))
    else:
      out[path] = value
  return out
