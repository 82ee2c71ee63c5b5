"""Options of XLA's compiler; they come and go with its versions."""

import functools
from collections.abc import Mapping
from typing import Any

import jax


def known(options: Mapping[str, Any]) -> dict[str, Any]:
  """Those options that the CPU's compiler takes; none on other backends."""
  if jax.default_backend() != "cpu":
    return {}
  return {name: value for name, value in options.items() if _takes(name, value)}


@functools.cache
def _takes(name: str, value: Any) -> bool:
  """Whether the installed XLA knows an option."""
  try:
    jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
