"""Compiling quickly what runs once, such as the maps of a picture."""

from collections.abc import Callable
from typing import Any

import jax

from tokjax import xla_options

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
  found = xla_options.known(OPTIONS) or None
  return jax.jit(function, compiler_options=found, **options)
