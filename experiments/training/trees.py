"""Names of the arrays in a pytree."""

import re
from typing import Any

import jax

from experiments.typed import ConfigError
from tokjax.interop import learned_parts


def path_name(path) -> str:
  """`encoder/block_0/norm1/scale`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Any) -> dict[str, Any]:
  """The leaves by name, in order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_name(path): leaf for path, leaf in leaves}


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `named` for a tree of dictionaries."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def overlay(tree: Any, values: Any, what: str) -> Any:
  """`tree` with its leaves replaced by those of the same name in `values`.

  Raises:
    ValueError: a name or shape that `tree` does not have; `what` says whose.
  """
  found, own = named(values), named(tree)
  for name, value in found.items():
    if name not in own or own[name].shape != value.shape:
      shape = own[name].shape if name in own else "no such parameter"
      raise ValueError(
        f"{what}: {name} has shape {value.shape}, the model {shape}; what is"
        " to start at random instead is said by `fresh`"
      )
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: found.get(path_name(path), leaf), tree
  )


def check_complete(recipe: str, model: Any, params: Any) -> None:
  """Raises ConfigError for a recipe whose parameters are not among `params`.

  Args:
    recipe: its name, for the message.
    model: built with it.
    params: to use with the model.
  """
  found = named(params)
  if missing := [n for n in learned_parts.shapes_of(model) if n not in found]:
    raise ConfigError(
      f"recipe {recipe!r} learns {missing[0]} and {len(missing) - 1} more"
      " parameters, which these weights do not have; train with it first"
      " (config.recipe) and start from that run"
    )


def matching(tree: Any, patterns: tuple[str, ...], what: str) -> Any:
  """True for every leaf whose name one of the regular expressions finds.

  Raises:
    ValueError: a pattern that finds none; `what` says whose pattern.
  """
  names = list(named(tree))
  for pattern in patterns:
    if not any(re.search(pattern, name) for name in names):
      raise ValueError(
        f"{what}: {pattern!r} matches no parameter; one is called {names[0]!r}"
      )
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(re.search(p, path_name(path)) for p in patterns), tree
  )
