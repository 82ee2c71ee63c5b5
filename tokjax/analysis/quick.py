"""Compiling quickly what runs once, such as the maps of a picture."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# On CPU these make the code of ToMe in a small ViT in a seventh of the time;
# it runs two to four times slower.
OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_use_fusion_emitters": False,
}


def jit(function: Callable[..., Any], **options) -> Callable[..., Any]:
  """`jax.jit` for functions that are called once or twice.

  On accelerators, whose compilers have no such options, the same as `jax.jit`.
  """
  return jax.jit(function, compiler_options=known() or None, **options)


@functools.cache
def known() -> dict[str, Any]:
  """Those of `OPTIONS` that the default backend's compiler takes."""
  if jax.default_backend() != "cpu":
    return {}
  return {name: value for name, value in OPTIONS.items() if _takes(name, value)}


def _takes(name: str, value: Any) -> bool:
  """Whether the installed XLA knows an option; they come and go."""
  try:
    jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
