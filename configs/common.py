"""What configs share."""

import ast
from typing import Any

import ml_collections
from ml_collections import config_dict

NOUNS = {int: "a whole number", float: "a number", str: "a word"}


def parse_arg(
  arg: str, *, others: str | None = None, **defaults: Any
) -> ml_collections.ConfigDict:
  """`"dataset=cifar100,runlocal"` to values with the types of `defaults`.

  Args:
    others: the entry for names that are none of `defaults`, whose values are
      Python literals or words; None: there may be none.
    **defaults: a value, or a type: None unless it is given.

  Raises:
    ValueError: a name that is none of `defaults`, an unreadable or an empty
      value.
  """
  kinds, values = {"runlocal": bool}, ml_collections.ConfigDict()
  values.runlocal = False
  for name, default in defaults.items():
    optional = isinstance(default, type)
    kinds[name] = default if optional else type(default)
    values[name] = config_dict.placeholder(default) if optional else default
  if others is not None:
    values[others] = {}
  for part in filter(None, arg.split(",")):
    name, _, text = part.partition("=")
    if others is not None and (name not in values or name == others):
      values[others][name] = _literal(text)
      continue
    if name not in values:
      raise ValueError(f"argument {name!r}: must be one of {sorted(values)}")
    values[name] = _value(kinds[name], part, text)
  return values


def _value(kind: type, part: str, text: str) -> Any:
  if kind is bool:
    if text.lower() not in ("", "true", "false"):
      raise ValueError(f"argument {part!r}: must be true or false")
    return text.lower() != "false"
  try:
    if not text:
      raise ValueError
    return kind(text)
  except ValueError:
    raise ValueError(f"argument {part!r}: must be {NOUNS[kind]}") from None


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def base() -> ml_collections.ConfigDict:
  """A config whose optional entries can be set on the command line."""
  config = ml_collections.ConfigDict()
  config.init = config_dict.placeholder(str)
  config.teacher = config_dict.placeholder(str)
  config.seed = 0
  config.mesh = dict(data=-1, fsdp=1, model=1)
  return config


def recipe(name: str = "none", keep: float | None = None) -> dict[str, Any]:
  """The entry `recipe`."""
  return dict(
    name=name, keep=config_dict.placeholder(float) if keep is None else keep
  )


def shorten(config: ml_collections.ConfigDict) -> None:
  """Two steps of a small batch: the form that the test suite runs."""
  config.steps, config.log_every, config.eval_every = 2, 1, 2
  config.batch_size, config.eval_batch_size = 8, 120
  config.threads = 1
