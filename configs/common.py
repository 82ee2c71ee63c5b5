"""What configs share."""

import ast
from typing import Any

import ml_collections
from ml_collections import config_dict


def parse_arg(
  arg: str, *, others: str | None = None, **defaults: Any
) -> ml_collections.ConfigDict:
  """`"dataset=cifar100,runlocal"` to values with the types of `defaults`.

  Args:
    others: where names go that are none of `defaults`, as Python literals or
      words; None: there may be none.

  Raises:
    ValueError: a name that is none of `defaults`, or an unreadable value.
  """
  values = ml_collections.ConfigDict({"runlocal": False, **defaults})
  if others is not None:
    values[others] = {}
  for part in filter(None, arg.split(",")):
    name, _, text = part.partition("=")
    if others is not None and (name not in values or name == others):
      values[others][name] = _literal(text)
      continue
    if name not in values:
      raise ValueError(f"argument {name!r}: must be one of {sorted(values)}")
    kind = type(values[name])
    if kind is bool:
      if text.lower() not in ("", "true", "false"):
        raise ValueError(f"argument {part!r}: must be true or false")
      values[name] = text.lower() != "false"
    else:
      values[name] = kind(text)
  return values


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
  return dict(name=name, keep=keep or config_dict.placeholder(float))


def shorten(config: ml_collections.ConfigDict) -> None:
  """Two steps of a small batch: the form that the test suite runs."""
  config.steps, config.log_every, config.eval_every = 2, 1, 2
  config.batch_size, config.eval_batch_size = 8, 120
  config.threads = 1
