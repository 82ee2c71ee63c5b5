"""Settings of a config on the command line: `--config.optimizer.lr=1e-3`.

Every field of the dataclasses that a config fills can be set, whether its file
names it or not. What they are, of which type and what they mean comes from the
dataclasses: their annotations, defaults and the section `Attributes` of their
docstrings.
"""

import ast
import dataclasses
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from experiments import typed

WIDTH = 80
WORDS = {"true": True, "1": True, "false": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Setting:
  """A field of a config.

  Attributes:
    option: that sets it, `--config.optimizer.lr`.
    kind: its type, in words.
    default: its value without the command line, in words.
    meaning: from the docstring.
  """

  option: str
  kind: str
  default: str
  meaning: str

  def text(self) -> str:
    """Two or more lines of at most `WIDTH` columns."""
    head = textwrap.wrap(
      f"{self.kind} ({self.default})", WIDTH - 2, initial_indent=" " * 4,
      subsequent_indent=" " * 6,
    )  # fmt: skip
    if len(head) == 1 and len(self.option) + len(head[0]) <= WIDTH:
      head = [f"  {self.option}  {head[0].strip()}"]
    else:
      head = [f"  {self.option}", *head]
    meaning = textwrap.wrap(
      self.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return "\n".join([*head, *meaning])


# ----- Set -----


def assign(
  config: ml_collections.ConfigDict,
  choose: Callable[[Mapping[str, Any]], type],
  changes: Sequence[tuple[str, str]],
) -> None:
  """Sets fields of `config`, in place.

  A new `name` of an entry that is one of several (a data set, a model) starts
  that entry anew: what the file says of another does not fit it.

  Args:
    config: from a file; references between its entries are kept.
    choose: the dataclass that it fills.
    changes: paths and texts, `("optimizer.lr", "1e-3")`. Names come first,
      others in the order given.

  Raises:
    ConfigError: an unknown path, or a text that its type cannot have.
  """
  for path, text in sorted(changes, key=_names_first):
    *parents, last = path.split(".")
    hint, chooses = _find(choose(config), config, parents, last)
    value = parse(hint, text, f"config.{path}")
    node = config
    for depth, key in enumerate(parents, 1):
      if not isinstance(node.get(key), Mapping | ml_collections.ConfigDict):
        _put(node, key, ml_collections.ConfigDict())
      elif chooses and depth == len(parents) and node[key].get(last) != value:
        _put(node, key, ml_collections.ConfigDict())
      node = node[key]
    _put(node, last, value)


def _names_first(change: tuple[str, str]) -> float:
  path, _ = change
  return path.count(".") if path.endswith(".name") else math.inf


def _put(node: ml_collections.ConfigDict, key: str, value: Any) -> None:
  with node.unlocked(), node.ignore_type():
    if isinstance(value, Mapping | ml_collections.ConfigDict) and key in node:
      del node[key]
    node[key] = value


def _find(
  cls: type, config: Any, parents: Sequence[str], last: str
) -> tuple[Any, bool]:
  """Annotation of a field; whether it chooses among several dataclasses."""
  hint: Any = cls
  where = "config"
  for key in [*parents, last]:
    table, inner = typed.parts(hint)
    here = config if hasattr(config, "get") else {}
    if table is not None and key == "name":
      return typing.Literal[tuple(table)], True
    if table is not None:
      inner = typed.chosen(table, here.get("name"), where)
    if inner is dict:
      return Any, False
    if inner is None:
      raise typed.ConfigError(f"{where}.{key}: {where} has no entries")
    hint = typed.field_type(inner, key, where)
    config, where = here.get(key), f"{where}.{key}"
  return hint, False


def parse(hint: Any, text: str, where: str) -> Any:
  """The value that `text` spells, for a field with the annotation `hint`.

  Tuples are `1,2` or Python's `(1, 2)`; `None` is None where that is allowed.

  Raises:
    ConfigError: it spells none.
  """
  table, inner = typed.parts(hint)
  if table is not None or inner is not None:
    value = _literal(text)
    if value is None and typed.optional(hint):
      return None
    if not isinstance(value, Mapping):
      example = "--" + where + ".name" if table is not None else "--" + where
      raise typed.ConfigError(
        f"{where}={text!r}: must be a mapping; its entries are set alone,"
        f" as {example}" + ("=NAME" if table is not None else ".KEY=VALUE")
      )
    return value
  value = _value(hint, text)
  typed.convert(hint, value, where)
  return value


def _value(hint: Any, text: str) -> Any:
  """As `parse`; the text itself, where it does not fit."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated:
    return _value(args[0], text)
  if origin in (types.UnionType, typing.Union):
    if text == "None" and type(None) in args:
      return None
    kinds = [arg for arg in args if arg is not type(None)]
    found = [_value(kind, text) for kind in kinds]
    return next((x for x in found if not isinstance(x, str)), text)
  if origin is typing.Literal:
    same = [arg for arg in args if str(arg) == text]
    return same[0] if same else text
  if origin is tuple or hint is tuple:
    return _tuple(args[0] if args else Any, text)
  if hint is str:
    return text
  if hint is bool:
    return WORDS.get(text.lower(), text)
  if hint in (int, float):
    try:
      return hint(text)
    except ValueError:
      return text
  return _literal(text)


def _tuple(kind: Any, text: str) -> tuple:
  """`(1, 2)`, `1,2`, `1` or nothing."""
  value = _literal(text)
  if isinstance(value, tuple | list):
    return tuple(value)
  parts = [part.strip() for part in text.split(",")]
  return tuple(_value(kind, part) for part in parts if part)


def _literal(text: str) -> Any:
  """Python's literal, or the text where it is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text


# ----- List -----


def listing(kinds: Sequence[type], config: Mapping[str, Any] | None) -> str:
  """All settings, for `--help`.

  Args:
    kinds: the dataclasses that a config may fill.
    config: whose values are the defaults that are shown, and whose choices are
      those that are listed; None: there is none, and all choices are listed.
  """
  parts = []
  for kind in kinds:
    title = (inspect.getdoc(kind) or "").split("\n")[0]
    parts.append(_wrapped(f"{kind.__name__}: {title}"))
    seen: dict[Any, str] = {}
    parts += _listed(kind, "", config, seen)
  return "\n".join(parts)


def _listed(
  cls: type, prefix: str, config: Mapping[str, Any] | None, seen: dict
) -> Iterator[str]:
  """Lines about the fields of `cls`; of one that was before, where it is."""
  if config is None and cls in seen:
    yield _wrapped(f"  --config.{prefix}*: as --config.{seen[cls]}* above")
    return
  if prefix:
    seen[cls] = prefix
  meanings = attributes(cls)
  hints = typing.get_type_hints(cls, include_extras=True)
  fields = [f for f in dataclasses.fields(cls) if f.init]
  # Plain values first: what follows a heading belongs to it.
  for field in sorted(fields, key=lambda f: _is_section(hints[f.name])):
    path, hint = prefix + field.name, hints[field.name]
    value = (config or {}).get(field.name, dataclasses.MISSING)
    if value is dataclasses.MISSING:
      value = _default(field)
    meaning = meanings.get(field.name, "")
    if not _is_section(hint):
      mapping = typed.parts(hint)[1] is dict
      option = f"--config.{path}" + (".KEY" if mapping else "")
      yield Setting(option, type_name(hint), shown(value), meaning).text()
      continue
    yield "\n" + _wrapped(f"--config.{path}: {meaning}")
    table, inner = typed.parts(hint)
    inside = None if config is None else {}
    if isinstance(value, Mapping):
      inside = value
    if table is not None:
      yield from _choices(table, path, value, inside, seen)
    else:
      yield from _listed(inner, f"{path}.", inside, seen)


def _is_section(hint: Any) -> bool:
  table, inner = typed.parts(hint)
  return table is not None or dataclasses.is_dataclass(inner)


def _choices(
  table: Mapping[str, type],
  path: str,
  value: Any,
  inside: Mapping[str, Any] | None,
  seen: dict,
) -> Iterator[str]:
  """An entry that is one of several dataclasses; the chosen one, or all."""
  names = [name for name, cls in table.items() if type(value) is cls]
  if inside is not None:
    names = [inside["name"]] if "name" in inside else names
  default = names[0] if names else dataclasses.MISSING
  option = f"--config.{path}.name"
  yield Setting(option, " | ".join(table), shown(default), "").text()
  for name in table if inside is None else names:
    if any(field.init for field in dataclasses.fields(table[name])):
      yield f"with --config.{path}.name={name}:"
      yield from _listed(table[name], f"{path}.", inside, seen)


def _wrapped(text: str) -> str:
  return textwrap.fill(text, WIDTH, subsequent_indent=" " * 6)


def _default(field: dataclasses.Field) -> Any:
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def shown(value: Any) -> str:
  """A default in words."""
  if value is dataclasses.MISSING or value is None:
    return "None" if value is None else "required"
  if isinstance(value, tuple | list):
    return ",".join(map(str, value)) or "empty"
  return str(value) if value != "" else "''"


def type_name(hint: Any) -> str:
  """A type in words: `int | None`, `adamw | lamb`, `float,...`."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated:
    return type_name(args[0])
  if origin is typing.Literal:
    return " | ".join(map(str, args))
  if origin in (types.UnionType, typing.Union):
    return " | ".join(map(type_name, args))
  if origin is tuple or hint is tuple:
    return f"{type_name(args[0])},..." if args else "value,..."
  if hint is type(None):
    return "None"
  return "value" if hint is Any or origin else hint.__name__


ENTRY = re.compile(r"((?:\w+, )*\w+): ?(.*)")


def attributes(cls: type) -> dict[str, str]:
  """What the docstrings of a class and its bases say of each attribute.

  A line `a, b: meaning` of the section `Attributes` is of both.
  """
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
    section = text.partition("\nAttributes:\n")[2]
    names: Sequence[str] = ()
    for line in section.split("\n"):
      if line and not line.startswith("  "):
        break
      entry = ENTRY.fullmatch(line[2:])
      if entry:
        names = entry[1].split(", ")
        found |= dict.fromkeys(names, entry[2])
      else:
        found |= {n: f"{found[n]} {line.strip()}".strip() for n in names}
  return found
