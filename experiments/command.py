"""The command line of an entry point: options, a config file, its settings."""

import argparse
import dataclasses
import importlib.util
import pathlib
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from experiments import settings
from experiments.typed import ConfigError, did_you_mean

ROOT = pathlib.Path(__file__).resolve().parents[1]
HELP = ("-h", "--help", "-help", "--helpfull", "--helpshort")
SETTING = re.compile(r"--?config\.([^=]+)(?:=(.*))?", re.DOTALL)


class UsageError(ValueError):
  """A command line that cannot be read; the message says what is wrong."""


@dataclasses.dataclass(frozen=True)
class Option:
  """An option of a command, `--name=value`.

  Attributes:
    name: without dashes.
    kind: type of its value; `bool` needs none: `--name` is True.
    default: without the option.
    meaning: for `--help`.
    required: it must be given.
    many: it may be repeated; the value is a list.
  """

  name: str
  kind: Callable[[str], Any]
  default: Any
  meaning: str
  required: bool = False
  many: bool = False

  def add_to(self, parser: argparse.ArgumentParser) -> None:
    """Tells argparse."""
    how: dict[str, Any] = dict(default=self.default)
    if self.kind is bool:
      how |= dict(type=boolean, nargs="?", const=True)
    else:
      how |= dict(type=self.kind, action="append" if self.many else "store")
    parser.add_argument(f"--{self.name}", **how)

  def setting(self) -> settings.Setting:
    """As `--help` shows it."""
    kind = getattr(self.kind, "__name__", "value")
    kind += ", may be repeated" if self.many else ""
    default = "required" if self.required else settings.shown(self.default)
    return settings.Setting(f"--{self.name}", kind, default, self.meaning)


def boolean(text: str) -> bool:
  """`true` or `false`."""
  if text.lower() not in settings.WORDS:
    raise argparse.ArgumentTypeError(f"{text!r}: must be true or false")
  return settings.WORDS[text.lower()]


class Parser(argparse.ArgumentParser):
  """Raises UsageError where argparse ends the process."""

  def __init__(self):
    super().__init__(add_help=False, allow_abbrev=False)

  def error(self, message: str):
    raise UsageError(message.removeprefix("argument "))


@dataclasses.dataclass(frozen=True)
class Command:
  """A command line.

  Attributes:
    about: what the command does, for `--help`.
    options: of its own.
    kinds: dataclasses that a config may fill; empty: there is no config.
    choose: which of `kinds` a config fills; None: the first.
    file: config file without `--config`; None: it must be given.
    reads_file: False for a command that has its config from elsewhere.
  """

  about: str
  options: Sequence[Option]
  kinds: Sequence[type] = ()
  choose: Callable[[Mapping[str, Any]], type] | None = None
  file: str | None = None
  reads_file: bool = True

  def parse(self, words: Sequence[str]) -> argparse.Namespace:
    """Values of the options, and of `config` if there is one.

    Raises:
      UsageError, ConfigError, OSError, ValueError: what cannot be used.
    """
    words, changes = self._split(words)
    values, rest = self._parser().parse_known_args(words)
    if rest:
      raise UsageError(self._unknown(rest[0]))
    for option in self._all():
      if option.required and getattr(values, option.name) is None:
        raise UsageError(f"--{option.name}: is required; see --help")
    values.changes = changes
    if self.kinds and self.reads_file:
      values.config = read(values.config)
      settings.assign(values.config, self._choose, changes)
    return values

  def help(self, words: Sequence[str]) -> str:
    """All options and settings; those of the config file that is named."""
    words, changes = self._split(words)
    values, _ = self._parser().parse_known_args(words)
    lines = [self.about.strip(), "", "Options:"]
    lines += [option.setting().text() for option in self._all()]
    if not self.kinds:
      return "\n".join(lines)
    config, kinds = None, self.kinds
    if self.reads_file and values.config is not None:
      found = read(values.config)
      settings.assign(found, self._choose, changes)
      config, kinds = found.to_dict(), [self._choose(found)]
    lines += ["", "Settings of the config:"]
    if config is not None:
      shown = pathlib.Path(values.config.partition(":")[0]).name
      lines[-1] = f"Settings of {shown}, with its values:"
    return "\n".join([*lines, settings.listing(kinds, config)])

  def _choose(self, config: Mapping[str, Any]) -> type:
    return self.kinds[0] if self.choose is None else self.choose(config)

  def _all(self) -> list[Option]:
    if not (self.kinds and self.reads_file):
      return list(self.options)
    meaning = (
      "Python file with a function `get_config()`; what follows a colon is"
      " its argument, FILE.py:ARGUMENT. Its settings can be changed, see below."
    )
    needed = self.file is None
    return [Option("config", str, self.file, meaning, needed), *self.options]

  def _parser(self) -> Parser:
    parser = Parser()
    for option in self._all():
      option.add_to(parser)
    return parser

  def _split(
    self, words: Sequence[str]
  ) -> tuple[list[str], list[tuple[str, str]]]:
    """Words without `--config.path=value`, and these."""
    if not self.kinds:
      return list(words), []
    rest, changes, words = [], [], list(words)
    while words:
      word = words.pop(0)
      found = SETTING.fullmatch(word)
      if found is None:
        rest.append(word)
      elif found[2] is not None:
        changes.append((found[1], found[2]))
      elif words and not words[0].startswith("--"):
        changes.append((found[1], words.pop(0)))
      else:
        raise UsageError(f"{word}: needs a value, {word}=VALUE")
    return rest, changes

  def _unknown(self, word: str) -> str:
    """What may have been meant."""
    if not word.startswith("-"):
      return f"unexpected argument {word!r}"
    name = word.lstrip("-").partition("=")[0]
    near = did_you_mean(f"--{name}", [f"--{o.name}" for o in self._all()])
    for kind in self.kinds:
      path = name.removeprefix("config.")
      fields = [f.name for f in dataclasses.fields(kind) if f.init]
      if path.partition(".")[0] in fields:
        near = f"; did you mean '--config.{path}'?"
    return f"unknown option --{name}{near or '; see --help'}"


# ----- Config files -----


def read(text: str) -> ml_collections.ConfigDict:
  """The config of `FILE.py` or `FILE.py:ARGUMENT`.

  Raises:
    OSError: there is no such file.
    ConfigError: it is no config file, or fails.
  """
  path, colon, argument = text.partition(":")
  make = getattr(load_module(path), "get_config", None)
  if make is None:
    raise ConfigError(f"{path}: has no function get_config()")
  config = run_config(path, make, *([argument] if colon else []))
  if isinstance(config, Mapping):
    config = ml_collections.ConfigDict(dict(config))
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f"{path}: get_config() returned a {type(config).__name__}; it must be a"
      " ConfigDict or a dict"
    )
  return config


def load_module(path: str) -> Any:
  """A config file as a module.

  A path that leads nowhere from here is one of a shipped config if there is
  one: `configs/digits.py` works in every folder.

  Raises:
    OSError: there is no such file.
    ConfigError: it is no Python file, or fails.
  """
  file = pathlib.Path(path)
  if file.suffix != ".py":
    raise ConfigError(f"config={path!r}: must be a Python file")
  if not file.is_file() and not file.is_absolute():
    file = ROOT / file
  if not file.is_file():
    raise FileNotFoundError(2, f"no such file{_near_file(path)}", path)
  spec = importlib.util.spec_from_file_location(file.stem, file)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{path}: cannot be read as Python")
  module = importlib.util.module_from_spec(spec)
  run_config(path, spec.loader.exec_module, module)
  return module


def run_config(path: str, call: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a part of a config file, which is a program and raises anything.

  Raises:
    ConfigError: with the place, unless the message of a ValueError says it.
  """
  try:
    return call(*arguments)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  except SyntaxError as error:
    raise ConfigError(f"SyntaxError: {error}") from error
  except Exception as error:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}, line {frame.lineno}"
    if frame.filename == __file__:
      where = path
    text = " ".join(str(error).split())
    raise ConfigError(f"{where}: {type(error).__name__}: {text}") from error


def _near_file(path: str) -> str:
  """`; did you mean 'configs/digits.py'?` of files that are shipped."""
  shipped = [
    str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.py")
  ]
  return did_you_mean(path, shipped)
